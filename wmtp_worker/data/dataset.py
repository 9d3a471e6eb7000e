"""Samples, what is known of each of their tokens, and how they are cut into batches."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from wmtp_worker.data.packing import Batch, Column, collate, collate_column
from wmtp_worker.data.sampler import PackedSampler
from wmtp_worker.data.tokenizer import Sample


@dataclass(frozen=True)
class Dataset:
    """Tokenized samples and how they are cut into batches.

    `columns`: by name, one float32 array per sample, as long as its ids; the batches carry them along. `difficulties`:
    of each problem, by its number, None where that is not known. Raises `ValueError` for a column of another length.
    """

    samples: list[Sample]
    sampler: PackedSampler
    sequence_length: int
    pad_id: int
    columns: Mapping[str, Column] = field(default_factory=dict)
    difficulties: Sequence[int | None] = ()

    def __post_init__(self) -> None:
        for name, column in self.columns.items():
            lengths = [len(values) for values in column]
            if lengths != [len(sample.ids) for sample in self.samples]:
                raise ValueError(f"column {name} does not have one number for each token of each sample")

    def with_columns(self, **columns: Column) -> "Dataset":
        """The same data with more columns."""
        return dataclasses.replace(self, columns={**self.columns, **columns})

    def batch(self, rows: list[list[int]]) -> Batch:
        batch = collate([[self.samples[i] for i in row] for row in rows], self.sequence_length, self.pad_id)
        columns = {
            name: collate_column([[column[i] for i in row] for row in rows], self.sequence_length)
            for name, column in self.columns.items()
        }
        return dataclasses.replace(batch, columns=columns) if columns else batch

    def epoch(self, rows_per_batch: int, max_batches: int = 0) -> Iterator[Batch]:
        """One pass in the order of epoch 0: the same batches every time, as validation wants them."""
        rows = self.sampler.rows(0)
        starts = range(0, len(rows), rows_per_batch)
        for start in starts[: max_batches or None]:
            yield self.batch(rows[start : start + rows_per_batch])


def rewards(samples: list[Sample]) -> Column:
    """The column "reward": 0 but at a sample's last token, which has the sample's."""
    column = []
    for sample in samples:
        values = np.zeros(len(sample.ids), dtype=np.float32)
        values[-1] = sample.reward
        column.append(values)
    return column
