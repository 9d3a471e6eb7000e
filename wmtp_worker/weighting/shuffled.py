"""Control: the weights of another family, shuffled within each sequence.

Each head keeps the very weights it has in a sequence, at other positions: what is left of a family's gain under this
control does not come from *which* tokens it weighs.
"""

import torch


def weights(
    base: torch.Tensor, labelled: torch.Tensor, sequence: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """`base` permuted over the labelled positions of each sequence, for each head apart.

    `base`: [batch, time, heads]; `labelled`: bool, same shape; `sequence`: int64 [batch, time] from `spans.sequences`;
    `generator`: on the CPU, the only source of chance. Returns float32 [batch, time, heads], without gradient.
    """
    heads = base.shape[-1]
    group = sequence[..., None] * heads + torch.arange(heads, device=base.device)
    group = group[labelled]
    order = group.argsort(stable=True)
    chance = torch.rand(len(group), generator=generator, dtype=torch.float64).to(base.device).argsort()
    shuffled = chance[group[chance].argsort(stable=True)]  # grouped the same, in random order inside each group
    out = torch.zeros_like(base, dtype=torch.float32)
    values = base.detach().float()[labelled]
    moved = torch.empty_like(values)
    moved[shuffled] = values[order]
    out[labelled] = moved
    return out
