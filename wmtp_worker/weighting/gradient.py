"""Gradient weights: a token counts by how far its own loss would move the model.

    importance   g[t,k] = ‖∂CE / ∂logits‖₂ = √(Σ_v p_v² - 2·p_y + 1)            p = softmax(logits), y the label
    or           g[t,k] = ‖∂CE / ∂h‖₂ = ‖Wᵀ(p - 1_y)‖₂                          h: hidden states, logits = W·h
    weight       w[t,k] = min(g[t,k], μ + c·σ) / μ

μ and σ are the moving mean and deviation of g (`statistics.MovingAverage`), c the outlier bound. The gradient of
cross-entropy with respect to logits is p - 1_y. Its norm as importance: Katharopoulos & Fleuret (2018), "Not All
Samples Are Created Equal", and the EL2N score of Paul et al. (2021), "Deep Learning on a Data Diet".
"""

from collections.abc import Callable

import torch

_BLOCK = 256  # positions


def logit_gradient_norm(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """‖∂CE/∂logits‖₂ of each position, without a backward pass: between 0 and √2.

    `logits`: [..., vocabulary]; `targets`: int64 [...], any negative one gives 0. Returns float32 [...].
    """

    def norm(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        p = logits.softmax(-1)
        label = p.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
        # Σp² - 2·p_y + 1, as a sum of squares: no cancellation near 0
        others = (p.square().sum(-1) - label.square()).clamp(min=0)
        return ((1 - label).square() + others).sqrt()

    return _of_each(norm, logits, targets)


def hidden_gradient_norm(logits: torch.Tensor, targets: torch.Tensor, unembedding: torch.Tensor) -> torch.Tensor:
    """‖∂CE/∂h‖₂ of each position, h the hidden states that the unembedding reads.

    `logits`: [..., vocabulary]; `targets`: int64 [...], any negative one gives 0; `unembedding`: [vocabulary,
    hidden_size]. Returns float32 [...]. Costs as much as the unembedding did.
    """
    matrix = unembedding.detach().float()

    def norm(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        gradient = logits.softmax(-1)
        label = targets.clamp(min=0)[:, None]
        gradient.scatter_add_(-1, label, torch.full_like(label, -1, dtype=gradient.dtype))
        norms: torch.Tensor = torch.linalg.vector_norm(gradient @ matrix, dim=-1)
        return norms

    return _of_each(norm, logits, targets)


def _of_each(
    norm: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], logits: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """A block of positions at a time: what is as wide as the vocabulary is never there twice as a whole."""
    flat = logits.detach().flatten(0, -2), targets.flatten()
    blocks = zip(*(tensor.split(_BLOCK) for tensor in flat), strict=True)
    norms = [norm(block.float(), labels).where(labels >= 0, 0) for block, labels in blocks]
    return torch.cat(norms).view(targets.shape)


def weights(importance: torch.Tensor, labelled: torch.Tensor, mean: float, std: float, outlier: float) -> torch.Tensor:
    """`min(g, μ + c·σ) / μ`; 1 where μ or every g is 0: nothing is left to learn, so nothing to tell apart.

    `importance`: [batch, time, heads]; `labelled`: bool, same shape; `outlier`: c > 0, in deviations. Returns float32
    [batch, time, heads], without gradient.
    """
    importance = importance.detach().float()
    if mean <= 0 or not importance[labelled].any():
        return labelled.float()
    return (importance.clamp(max=mean + outlier * std) / mean).where(labelled, 0)
