"""Gradient weights: a token counts by how far its own loss would move the model.

    importance   g[t,k] = ‖∂CE / ∂logits‖₂ = √(Σ_v p_v² - 2·p_y + 1)            p = softmax(logits), y the label
    or           g[t,k] = ‖∂CE / ∂h‖₂ = ‖Wᵀ(p - 1_y)‖₂                          h: hidden states, logits = W·h
    weight       w[t,k] = min(g[t,k], μ + c·σ) / μ

μ and σ are the moving mean and deviation of g (`statistics.MovingAverage`), c the outlier bound. The gradient of
cross-entropy with respect to logits is p - 1_y; both norms come with the losses, from one pass over the logits, after
which the unembedding's gradient takes a second one (`training.linear_cross_entropy`). Its norm as importance:
Katharopoulos & Fleuret (2018), "Not All Samples Are Created Equal", and the EL2N score of Paul et al. (2021), "Deep
Learning on a Data Diet".
"""

import torch


def weights(importance: torch.Tensor, labelled: torch.Tensor, mean: float, std: float, outlier: float) -> torch.Tensor:
    """`min(g, μ + c·σ) / μ`; 1 where μ or every g is 0: nothing is left to learn, so nothing to tell apart.

    `importance`: [batch, time, heads]; `labelled`: bool, same shape; `outlier`: c > 0, in deviations. Returns float32
    [batch, time, heads], without gradient.
    """
    importance = importance.detach().float()
    if mean <= 0 or not importance[labelled].any():
        return labelled.float()
    return (importance.clamp(max=mean + outlier * std) / mean).where(labelled, 0)
