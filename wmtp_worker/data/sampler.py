"""An endless, shuffled stream of rows whose position is one small state."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from wmtp_worker.data.packing import pack


@dataclass
class Position:
    """Where the stream stands: `row` rows of epoch `epoch` have been handed out."""

    epoch: Annotated[int, Field(ge=0)] = 0
    row: Annotated[int, Field(ge=0)] = 0

    def to_json(self) -> dict[str, int]:
        return asdict(self)


class PackedSampler:
    """Rows of sample indices, each epoch shuffled and packed anew from (seed, epoch) alone.

    `lengths`: tokens per sample. Every sample comes up exactly once an epoch. With `packing` off a row is one sample.
    """

    def __init__(self, lengths: Sequence[int], sequence_length: int, seed: int, packing: bool = True) -> None:
        self._lengths = lengths
        self._sequence_length = sequence_length
        self._seed = seed
        self._packing = packing
        self._planned: tuple[int, list[list[int]]] | None = None

    def rows(self, epoch: int) -> list[list[int]]:
        """The whole plan of one epoch; the same for equal (seed, epoch) and data."""
        if self._planned is None or self._planned[0] != epoch:
            order = np.random.default_rng([self._seed, epoch]).permutation(len(self._lengths)).tolist()
            rows = pack(order, self._lengths, self._sequence_length) if self._packing else [[i] for i in order]
            self._planned = (epoch, rows)
        return self._planned[1]

    def take(self, position: Position, count: int) -> tuple[list[list[int]], Position]:
        """The next `count` rows from `position`, and the position after them. `position` itself is left as it is."""
        taken: list[list[int]] = []
        epoch, row = position.epoch, position.row
        while len(taken) < count:
            rows = self.rows(epoch)
            part = rows[row : row + count - len(taken)]
            taken += part
            row += len(part)
            if row >= len(rows):
                epoch, row = epoch + 1, 0
        return taken, Position(epoch, row)
