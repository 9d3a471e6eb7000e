"""Several samples in one row, without attention or positions leaking across them.

Each sample of a row is a segment with its own number; positions start at 0 in each. Attention is causal inside a
segment (`model.mtp.packed_attention_mask`), and no label crosses from one into the next (`training.loss.mtp_labels`).
"""

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from wmtp_worker.data.tokenizer import Sample

IGNORE = -100
PADDING_SEGMENT = 0
Column = Sequence[npt.NDArray[np.float32]]
WINDOW = 1024  # samples that are packed together
METHOD = f"best fit decreasing, {WINDOW}"  # what the order of the data follows from, beside the seed


@dataclass(frozen=True)
class Batch:
    """Rows of packed samples; every tensor is int64 of shape [rows, sequence_length].

    `labels`: the token itself where it belongs to a response, else -100 (not shifted). `segment_ids`: 1, 2, … for the
    samples of a row, 0 for padding. `position_ids`: restart at 0 in each segment. `columns`: what else is known of each
    token, by name, float32 of the same shape; 0 in padding.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    segment_ids: torch.Tensor
    columns: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> "Batch":
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """The same in page-locked memory: copied to a GPU without anyone waiting for it."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        return Batch(
            change(self.input_ids),
            change(self.labels),
            change(self.position_ids),
            change(self.segment_ids),
            {name: change(column) for name, column in self.columns.items()},
        )

    @property
    def real_tokens(self) -> int:
        """Tokens that are not padding."""
        return int((self.segment_ids != PADDING_SEGMENT).sum())


def pack(order: Sequence[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best fit decreasing: the samples of a window, longest first, each into the fullest row that still has room.

    A window is `WINDOW` samples in `order`, so that every part of an epoch has samples of every length, and packing an
    epoch of millions takes seconds. The rows of a window come in the order that their longest samples have in `order`:
    longest first would be a curriculum. `lengths`: tokens per sample, each at most `capacity`. Returns rows of sample
    indices; deterministic. (Johnson, "Near-optimal bin packing algorithms", 1973.)
    """
    rows: list[list[int]] = []
    for start in range(0, len(order), WINDOW):
        rows += _pack_window(order[start : start + WINDOW], lengths, capacity)
    return rows


def _pack_window(order: Sequence[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # what is left in each row, and its number; least room first
    place = {index: number for number, index in enumerate(order)}
    for index in sorted(order, key=lambda index: -lengths[index]):
        found = bisect.bisect_left(rooms, (lengths[index], -1))
        if found < len(rooms):
            room, number = rooms.pop(found)
        else:
            room, number = capacity, len(rows)
            rows.append([])
        rows[number].append(index)
        bisect.insort(rooms, (room - lengths[index], number))
    return sorted(rows, key=lambda row: place[row[0]])


def collate(rows: Sequence[Sequence[Sample]], sequence_length: int, pad_id: int) -> Batch:
    """Lay samples side by side, pad the rest of each row. Raises `ValueError` for a row that does not fit.

    In numpy, as is `collate_column`: many small pieces cost it a fraction, and it makes no thread a team of others.
    """
    shape = (len(rows), sequence_length)
    input_ids = np.full(shape, pad_id, np.int64)
    labels = np.full(shape, IGNORE, np.int64)
    position_ids = np.empty(shape, np.int64)
    segment_ids = np.full(shape, PADDING_SEGMENT, np.int64)
    places = np.arange(sequence_length)
    for number, row in enumerate(rows):
        start = 0
        for segment, sample in enumerate(row, start=1):
            end = start + len(sample.ids)
            input_ids[number, start:end] = sample.ids
            labels[number, start + sample.prompt_length : end] = sample.ids[sample.prompt_length :]
            position_ids[number, start:end] = places[: len(sample.ids)]
            segment_ids[number, start:end] = segment
            start = end
        # padding has positions of its own, so that rotary embeddings stay in range
        position_ids[number, start:] = places[: sequence_length - start]
    return Batch(
        torch.from_numpy(input_ids),
        torch.from_numpy(labels),
        torch.from_numpy(position_ids),
        torch.from_numpy(segment_ids),
    )


def collate_column(rows: Sequence[Column], sequence_length: int) -> torch.Tensor:
    """One number a token, laid out as `collate` lays out the tokens: float32 [rows, sequence_length], 0 in padding."""
    column = np.zeros((len(rows), sequence_length), np.float32)
    for number, row in enumerate(rows):
        values = np.concatenate(row, dtype=np.float32, casting="same_kind")
        column[number, : len(values)] = values
    return torch.from_numpy(column)
