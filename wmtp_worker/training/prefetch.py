"""The next step's batches, made by a thread while this step computes.

with Prefetcher(task.data, settings.training, group) as prefetcher:
    while …:
        data = prefetcher.take(progress.position)
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

import torch

from wmtp_worker.data.packing import Batch
from wmtp_worker.data.sampler import Position
from wmtp_worker.settings import TrainingSettings
from wmtp_worker.training.group import Group
from wmtp_worker.training.task import Rows


@dataclass(frozen=True)
class StepData:
    """Of one optimizer step, of all ranks: its rows, the position after them, and one batch for each micro-batch."""

    rows: list[list[int]]
    after: Position
    batches: list[Batch]


class Prefetcher:
    """One step ahead, never more. What it hands out follows from the position alone, so a checkpoint has nothing of it.

    From `with` on there is a thread, which has ended when that is left, in whatever way.
    """

    def __init__(self, data: Rows, training: TrainingSettings, group: Group) -> None:
        """Batches of this rank's own share are page-locked where it has a GPU, so that they are copied in passing."""
        self._data = data
        self._size, self._count = training.micro_batch_size, training.accumulation
        self._group = group
        self._next: tuple[Position, Future[StepData]] | None = None

    def __enter__(self) -> Self:
        self._thread = ThreadPoolExecutor(1, "prefetch", initializer=self._start)
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def take(self, position: Position) -> StepData:
        """The step at `position`, waited for; the one after it begins to be made. Raises what making it raised."""
        if self._next is None or self._next[0] != position:
            self._begin(position)
        assert self._next is not None
        data = self._next[1].result()
        self._begin(data.after)
        return data

    def _begin(self, position: Position) -> None:
        self._next = position, self._thread.submit(self._make, position)

    def _start(self) -> None:
        if self._group.device.index is not None:  # else page-locking would take memory of the first GPU
            torch.cuda.set_device(self._group.device)

    def _make(self, position: Position) -> StepData:
        rows, after = self._data.sampler.take(position, self._size * self._count)
        batches = [self._data.batch(rows[start : start + self._size]) for start in range(0, len(rows), self._size)]
        if self._group.device.type == "cuda":
            for number in self._group.share(range(self._count)):
                batches[number] = batches[number].pinned()
        return StepData(rows, after, batches)
