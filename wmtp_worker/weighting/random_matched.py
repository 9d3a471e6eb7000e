"""Control: random weights with the distribution of another family's.

Each labelled entry draws one of the batch's weights of its head, with replacement, independently of everything: same
mean, spread and tails, no memory of position or sequence.
"""

import torch


def weights(base: torch.Tensor, labelled: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A draw from the labelled weights of `base`, for each head apart.

    `base`: [batch, time, heads]; `labelled`: bool, same shape; `generator`: on the CPU, the only source of chance.
    Returns float32 [batch, time, heads], without gradient.
    """
    out = torch.zeros_like(base, dtype=torch.float32)
    for k in range(base.shape[-1]):
        mask = labelled[..., k]
        values = base[..., k][mask].detach().float()
        if len(values):
            drawn = torch.randint(len(values), (len(values),), generator=generator)
            out[..., k][mask] = values[drawn.to(values.device)]
    return out
