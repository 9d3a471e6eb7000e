"""What a batch's weights look like, as numbers for the log."""

import math

import torch

from wmtp_worker.weighting.bins import EDGES


def summarise(weights: torch.Tensor, labelled: torch.Tensor) -> dict[str, float]:
    """`weight_mean`, `_std`, `_min`, `_max` and `_entropy` over the labelled entries; empty without any.

    `weights`: float32 [batch, time, heads]; `labelled`: bool, same shape. Entropy: of the shares p = w / Σw, divided by
    its largest value ln N, so 1 is uniform and 0 all weight on one of the N entries (1 for N = 1).
    """
    chosen = weights[labelled].to("cpu", torch.float64)
    if not len(chosen):
        return {}
    shares = chosen / chosen.sum()
    entropy = float(torch.special.entr(shares).sum()) / math.log(len(chosen)) if len(chosen) > 1 else 1.0
    return {
        "weight_mean": float(chosen.mean()),
        "weight_std": float(chosen.std(correction=0)),
        "weight_min": float(chosen.min()),
        "weight_max": float(chosen.max()),
        "weight_entropy": entropy,
    }


def clipped_share(weights: torch.Tensor, labelled: torch.Tensor, low: float, high: float) -> float:
    """Share of the labelled weights that stand on one of their bounds."""
    chosen = weights[labelled]
    at_bound = (chosen <= low * (1 + 1e-6)) | (chosen >= high * (1 - 1e-6))
    return float(at_bound.float().mean()) if chosen.numel() else 0.0


def histogram(weights: torch.Tensor, labelled: torch.Tensor) -> list[int]:
    """How many of the labelled weights are 0, up to each of `bins.EDGES`, and above the last: len(EDGES) + 2 counts.

    `weights`: float32, any shape; `labelled`: bool, same shape.
    """
    chosen = weights[labelled].to("cpu", torch.float64)
    above_zero = chosen[chosen > 0]
    bins = torch.bucketize(above_zero, torch.tensor(EDGES, dtype=torch.float64))
    counts: list[int] = torch.bincount(bins, minlength=len(EDGES) + 1).tolist()
    return [len(chosen) - len(above_zero), *counts]
