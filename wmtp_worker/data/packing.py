"""Several samples in one row, without attention or positions leaking across them.

Each sample of a row is a segment with its own number; positions start at 0 in each. Attention is causal inside a
segment (`model.mtp.packed_attention_mask`), and no label crosses from one into the next (`training.loss.mtp_labels`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from wmtp_worker.data.tokenizer import Sample

IGNORE = -100
PADDING_SEGMENT = 0
Column = Sequence[npt.NDArray[np.float32]]
# rows kept open while packing: bounds the search, costs next to no space
_OPEN_ROWS = 64


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
        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        return Batch(
            move(self.input_ids),
            move(self.labels),
            move(self.position_ids),
            move(self.segment_ids),
            {name: move(column) for name, column in self.columns.items()},
        )

    @property
    def real_tokens(self) -> int:
        """Tokens that are not padding."""
        return int((self.segment_ids != PADDING_SEGMENT).sum())


def pack(order: Iterable[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First fit: each sample, in `order`, goes into the first open row that still has room.

    `lengths`: tokens per sample, each at most `capacity`. Returns rows of sample indices; deterministic.
    """
    rows: list[list[int]] = []
    open_rows: list[tuple[list[int], int]] = []
    for index in order:
        length = lengths[index]
        for place, (row, room) in enumerate(open_rows):
            if length <= room:
                row.append(index)
                open_rows[place] = (row, room - length)
                break
        else:
            rows.append([index])
            open_rows.append((rows[-1], capacity - length))
            if len(open_rows) > _OPEN_ROWS:
                open_rows.remove(min(open_rows, key=lambda item: item[1]))
    return rows


def collate(rows: Sequence[Sequence[Sample]], sequence_length: int, pad_id: int) -> Batch:
    """Lay samples side by side, pad the rest of each row. Every row's samples must fit `sequence_length`."""
    shape = (len(rows), sequence_length)
    input_ids = torch.full(shape, pad_id)
    labels = torch.full(shape, IGNORE)
    position_ids = torch.zeros(shape, dtype=torch.int64)
    segment_ids = torch.full(shape, PADDING_SEGMENT)
    for number, row in enumerate(rows):
        start = 0
        for segment, sample in enumerate(row, start=1):
            end = start + len(sample.ids)
            ids = torch.from_numpy(sample.ids).to(torch.int64)
            input_ids[number, start:end] = ids
            labels[number, start + sample.prompt_length : end] = ids[sample.prompt_length :]
            position_ids[number, start:end] = torch.arange(len(ids))
            segment_ids[number, start:end] = segment
            start = end
        # padding has positions of its own, so that rotary embeddings stay in range
        position_ids[number, start:] = torch.arange(sequence_length - start)
    return Batch(input_ids, labels, position_ids, segment_ids)


def collate_column(rows: Sequence[Column], sequence_length: int) -> torch.Tensor:
    """One number a token, laid out as `collate` lays out the tokens: float32 [rows, sequence_length], 0 in padding."""
    column = torch.zeros((len(rows), sequence_length))
    for number, row in enumerate(rows):
        values = torch.from_numpy(np.concatenate(row, dtype=np.float32, casting="same_kind"))
        column[number, : len(values)] = values
    return column
