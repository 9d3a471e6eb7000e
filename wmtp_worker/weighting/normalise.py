"""The last step of every family: weights whose mean says nothing any more; so the learning rate keeps its meaning."""

from typing import Literal

import torch

Normalisation = Literal["mean1", "mean1_clip", "none"]

_HALVINGS = 64


def normalise(
    weights: torch.Tensor, labelled: torch.Tensor, how: Normalisation, low: float = 0.0, high: float = float("inf")
) -> torch.Tensor:
    """Weights with mean 1 over the labelled entries, or as they are.

    - `mean1`: divided by their mean.
    - `mean1_clip`: `clip(s·w, low, high)` with the one s for which its mean is 1: both the mean and the bounds hold
      (low ≤ 1 ≤ high), other than with a division before or after a clip. s is found by bisection. Where too many
      weights are 0 for any s, the mean stays below 1.
    - `none`: unchanged.

    `weights`: float [batch, time, heads], not negative; `labelled`: bool, same shape. Returns float32, 0 where there
    is no label. Raises `ValueError` where every labelled weight is 0 or one is not finite: nothing could be learned.
    """
    weights = weights.detach().float().where(labelled, 0)
    count = int(labelled.sum())
    if count == 0:
        return weights
    mean = float(weights.sum(dtype=torch.float64 if weights.device.type != "mps" else None)) / count
    if not 0 < mean < float("inf"):
        raise ValueError(f"the mean of {count} weights is {mean}")
    if how == "none":
        return weights
    weights = weights / mean
    if how == "mean1":
        return weights
    return (weights * _scale(weights[labelled], low, high)).clamp(low, high).where(labelled, 0)


def _scale(weights: torch.Tensor, low: float, high: float) -> float:
    """s with mean(clip(s·weights, low, high)) = 1. That mean grows with s: bisect below a power of two."""
    chosen = weights.to("cpu", torch.float64)

    def mean(scale: float) -> float:
        return float((chosen * scale).clamp(low, high).mean())

    upper = 1.0
    while mean(upper) < 1 and upper < 2.0**_HALVINGS:
        upper *= 2
    lower = 0.0
    for _ in range(_HALVINGS):
        middle = (lower + upper) / 2
        lower, upper = (middle, upper) if mean(middle) < 1 else (lower, middle)
    return upper
