"""Uniform weights: every labelled token and head counts the same. The baseline, plain multi-token prediction."""

import torch


def weights(labelled: torch.Tensor) -> torch.Tensor:
    """1 where there is a label, 0 elsewhere.

    `labelled`: bool, shape [batch, time, heads]. Returns float32 of the same shape, without gradient.
    """
    return labelled.to(torch.float32)
