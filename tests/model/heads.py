"""What the tests of this room compare."""

import torch

from wmtp_worker.model.mtp import MTPForCausalLM, packed_attention_mask

IDS = torch.arange(34).view(2, 17) * 7 % 64


def inputs(ids: torch.Tensor = IDS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, positions and mask of rows that hold one sample each."""
    return ids, torch.arange(ids.shape[1]).expand_as(ids), packed_attention_mask(torch.ones_like(ids))


def head_logits(model: MTPForCausalLM, ids: torch.Tensor = IDS) -> list[torch.Tensor]:
    """Logits [batch, time, vocabulary] of every head."""
    with torch.no_grad():
        trunk = model.trunk(*inputs(ids))
        return [model.head_logits(number, trunk) for number in range(1, model.heads + 1)]
