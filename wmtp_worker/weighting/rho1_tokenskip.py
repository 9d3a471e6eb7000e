"""Rho-1 token skip: only the share of tokens with the largest excess loss is trained on.

    w[t,k] = 1 if e[t,k] is among the ⌈share·N⌉ largest of the batch's N for head k, else 0

Selective Language Modeling of Lin et al. (2024), Rho-1, §2.2, for each head apart. With `mean1` the kept ones weigh
N / ⌈share·N⌉, which makes the loss their mean over the kept tokens.
"""

import math

import torch


def weights(excess: torch.Tensor, labelled: torch.Tensor, share: float) -> torch.Tensor:
    """1 for the tokens with the largest excess loss, 0 for the others.

    `excess`: [batch, time, heads], nats (`rho1_weighted.excess_loss`); `labelled`: bool, same shape; 0 < share ≤ 1.
    Of equal ones the first in memory are kept. Returns float32 [batch, time, heads], without gradient.
    """
    excess = excess.detach().float()
    out = torch.zeros_like(excess)
    for k in range(excess.shape[-1]):
        chosen = excess[..., k][labelled[..., k]]
        kept = torch.zeros_like(chosen)
        order = chosen.sort(descending=True, stable=True).indices
        kept[order[: math.ceil(share * len(chosen))]] = 1
        out[..., k][labelled[..., k]] = kept
    return out
