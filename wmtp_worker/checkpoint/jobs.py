"""What the saver has to do: checkpoints, and weights alone for `best_model.pt`. Both are copied first, then written."""

import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from wmtp_worker.checkpoint.ranks import Ranks
from wmtp_worker.checkpoint.snapshot import Kind, Snapshot
from wmtp_worker.checkpoint.staging import Buffers, Content, Copies
from wmtp_worker.checkpoint.store import contents_of
from wmtp_worker.checkpoint.tensorfile import Tensors
from wmtp_worker.storage.layout import step_name

WEIGHTS = "weights"  # the one "file" in the buffers of an export


@dataclass
class Cost:
    """What one save cost, in seconds: `pause` of the training's thread, and behind it the copy and the writing.

    `busy` is the writing without the time that its thread rested, or waited for a processor.
    """

    step: int
    kind: Kind = "full"
    bytes: int = 0
    pause: float = 0.0
    copy: float = 0.0
    write: float = 0.0
    busy: float = 0.0


class Job(ABC):
    """Something to copy and to write. `pool` is where its buffers come from."""

    name: str

    def __init__(self, step: int, pool: list[Buffers]) -> None:
        self.step, self._pool = step, pool
        self.copies = Copies()
        self.contents: Mapping[str, Content] = {}
        self.buffers: Buffers | None = None  # None: written from the tensors themselves
        self.bytes = self.done = 0  # to be written, and written
        self.since = 0.0  # when the training began to wait for it, on `time.perf_counter`'s clock

    @property
    def can_start(self) -> bool:
        return bool(self._pool)

    @property
    def remaining(self) -> int:
        """Bytes that are still to be written."""
        return self.bytes - self.done

    def look(self, ranks: Ranks) -> None:
        """Find out what is to be written. Not when it is made: with thousands of tensors it takes milliseconds."""
        self.contents = self._find(ranks)
        self.bytes = sum(value.nbytes for content in self.contents.values() for value in content.tensors.values())

    @abstractmethod
    def _find(self, ranks: Ranks) -> Mapping[str, Content]:
        """What is to be written, by the name of the file."""

    @abstractmethod
    def goes_on(self) -> None:
        """The training goes on."""

    def take(self) -> None:
        """Take buffers: only where it `can_start`."""
        self.buffers = self._pool.pop()

    def give_back(self) -> None:
        """The buffers are not needed any more."""
        if self.buffers is not None:
            self._pool.append(self.buffers)
        self.buffers = None


class SaveJob(Job):
    """A checkpoint."""

    def __init__(self, snapshot: Snapshot, pool: list[Buffers], since: float) -> None:
        super().__init__(snapshot.step, pool)
        self.name = step_name(snapshot.step)
        self.snapshot = snapshot.by_value()
        self.cost = Cost(snapshot.step, snapshot.kind)
        self.since = since

    def goes_on(self) -> None:
        """The training goes on: what it waited since `since` was a pause."""
        self.cost.pause += time.perf_counter() - self.since

    def _find(self, ranks: Ranks) -> Mapping[str, Content]:
        return contents_of(self.snapshot, ranks)

    def let_go(self) -> None:
        """Of the tensors, which are not needed any more."""
        self.snapshot, self.contents = replace(self.snapshot, tensors={}, frozen={}), {}


class ExportJob(Job):
    """Weights for `best_model.pt`. `tried`: the disk was full; the next try comes after the next save."""

    def __init__(self, path: Path, step: int, tensors: Tensors, facts: Mapping[str, Any], pool: list[Buffers]) -> None:
        super().__init__(step, pool)
        self.name = f"{path.name} of {step_name(step)}"
        self.path, self.facts = path, copy.deepcopy(dict(facts))
        self._live = tensors
        self.tried = False

    def _find(self, ranks: Ranks) -> Mapping[str, Content]:
        return {WEIGHTS: Content(self._live)}

    def goes_on(self) -> None:
        """What it waited is not counted: pauses are those of saves."""

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """In the order they were given: the copies, each with memory of its own, or the tensors themselves."""
        if self.buffers is None:
            return dict(self._live)
        views = self.buffers.files[WEIGHTS].views
        return {name: _alone(views[name]) for name in self._live}


def _alone(view: torch.Tensor) -> torch.Tensor:
    # the same bytes as a storage of their own: torch.save would write the whole buffer for a view of it
    if not view.numel():
        return view.clone()
    flat = torch.from_numpy(view.reshape(-1).view(torch.uint8).numpy())
    return flat.view(view.dtype).view(view.shape)
