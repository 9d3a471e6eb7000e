"""Tokens, heads and the sequences they belong to."""

import torch


def ahead(values: torch.Tensor, heads: int) -> torch.Tensor:
    """What head k sees of a quantity of tokens: `out[b, t, k-1] = values[b, t + k]`, 0 past the end of the row.

    `values`: [batch, time]. Returns [batch, time, heads], the same dtype. It looks across the borders of sequences:
    mask it with the labels, which do not.
    """
    out = values.new_zeros(*values.shape, heads)
    for k in range(1, heads + 1):
        out[:, :-k, k - 1] = values[:, k:]
    return out


def sequences(segment_ids: torch.Tensor) -> torch.Tensor:
    """A number for each packed sequence of the batch: int64 [batch, time], equal inside one, different between two.

    `segment_ids`: int64 [batch, time], numbers that are unique within their row only. Padding gets a number too.
    """
    rows = torch.arange(len(segment_ids), device=segment_ids.device)[:, None]
    return rows * (segment_ids.max() + 1) + segment_ids


def last_tokens(segment_ids: torch.Tensor) -> torch.Tensor:
    """bool [batch, time]: whether a token is the last of its sequence; padding, segment 0, has none.

    `segment_ids`: int64 [batch, time]. Selecting by it gives the sequences row by row, from left to right.
    """
    last = segment_ids != 0
    last[:, :-1] &= segment_ids[:, :-1] != segment_ids[:, 1:]
    return last


def sequence_softmax(scores: torch.Tensor, labelled: torch.Tensor, sequence: torch.Tensor) -> torch.Tensor:
    """Softmax over the labelled positions of each sequence, for each head apart.

    `scores`: [batch, time, heads]; `labelled`: bool, same shape; `sequence`: int64 [batch, time] from `sequences`.
    Returns float32 [batch, time, heads] whose sum over a sequence is 1 for each head with a label in it.
    """
    heads = scores.shape[-1]
    scores = scores.float().masked_fill(~labelled, -torch.inf).reshape(-1, heads)
    index = sequence.reshape(-1, 1).expand(-1, heads)
    shape = (int(sequence.max()) + 1, heads)
    top = scores.new_full(shape, -torch.inf).scatter_reduce(0, index, scores, "amax")
    powers = (scores - top.gather(0, index)).exp().where(labelled.reshape(-1, heads), 0)
    sums = powers.new_zeros(shape).index_add(0, sequence.flatten(), powers)
    return (powers / sums.gather(0, index).clamp(min=1)).view(labelled.shape)  # the largest power is 1


def sequence_counts(labelled: torch.Tensor, sequence: torch.Tensor) -> torch.Tensor:
    """How many labelled positions the sequence of each position has, for each head: float32 [batch, time, heads]."""
    heads = labelled.shape[-1]
    counts = torch.zeros(int(sequence.max()) + 1, heads, device=labelled.device)
    counts = counts.index_add(0, sequence.flatten(), labelled.reshape(-1, heads).float())
    return counts[sequence]
