"""Uniform weights: every labelled token and head counts the same.

    weight       w[t,k] = 1

The baseline, plain multi-token prediction: Gloeckle et al. (2024), "Better & Faster Large Language Models via
Multi-token Prediction", eq. 2.
"""

import torch


def weights(labelled: torch.Tensor) -> torch.Tensor:
    """1 where there is a label, 0 elsewhere.

    `labelled`: bool, shape [batch, time, heads]. Returns float32 of the same shape, without gradient.
    """
    return labelled.to(torch.float32)
