"""Control: random weights with the distribution of another family's.

Each labelled entry draws one of the batch's weights of its head, with replacement, independently of everything: same
mean, spread and tails, no memory of position or sequence. Only a draw in which all are 0, where not all of the weights
are, is drawn again: nothing could be learned from it.
"""

import torch

_DRAWS = 64  # with one weight among many zeros more than a third of the draws are 0 throughout


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
            for _ in range(_DRAWS):
                drawn = torch.randint(len(values), (len(values),), generator=generator)
                chosen = values[drawn.to(values.device)]
                if chosen.any() or not values.any():
                    break
            out[..., k][mask] = chosen
    return out
