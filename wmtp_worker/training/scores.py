"""What a frozen model says of every token of a data set, computed once and kept on the disk.

    <workdir>/cache/scores/<digest>/scores.npy      float32, the tokens of one sample after the other
                                    part-<n>.npy    the same of some samples, while not all are done

The digest stands for all that the numbers follow from: model, tokenizer, tokens, precision, and how the samples are
laid out in rows. A part appears whole or not at all; a process that was killed goes on after the last one. Whoever
needs the same scores at the same time waits for them. Nothing else looks into these folders: they may be deleted.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console

from wmtp_worker.data.packing import Column, collate, pack
from wmtp_worker.data.tokenizer import Sample
from wmtp_worker.errors import InputError
from wmtp_worker.settings import Settings
from wmtp_worker.storage.atomic import TEMPORARY_PREFIX, atomic_path
from wmtp_worker.storage.layout import scores_dir
from wmtp_worker.storage.transfer.locks import file_lock
from wmtp_worker.tracking.console import StepBar
from wmtp_worker.tracking.heartbeat import Heartbeat
from wmtp_worker.training.frozen import Frozen, Judge
from wmtp_worker.training.loss import autocast

log = logging.getLogger(__name__)

PART = 64  # samples
_WHOLE = "scores.npy"
_LINE_SECONDS = 30.0


class Scorer:
    """Where a run keeps scores, and how it computes them."""

    def __init__(
        self,
        settings: Settings,
        device: torch.device,
        poll: Callable[[str], None],
        heartbeat: Heartbeat,
        console: Console,
    ) -> None:
        """`poll` is called, with what is being done, before each forward pass, and may raise to stop."""
        self._cache = scores_dir(settings.run.workdir)
        self._device = device
        self._precision = settings.training.precision
        self._sequence_length = settings.data.sequence_length
        self.poll: Callable[[], None] = lambda: poll("scores")
        self._heartbeat = heartbeat
        self._console = console

    def score(self, frozen: Frozen, digests: Sequence[str], samples: Sequence[Sample]) -> Column:
        """One number for each token of each sample, read from the disk when it is looked at.

        `digests`: of the model and of the tokenizer. The model is loaded only where something is missing. Raises
        `InputError` for a model that does not load or gives no finite number, `DiskFullError`, and what `poll` raises.
        """
        folder = self._cache / self._digest(frozen, digests, samples)
        bounds = np.cumsum([0, *(len(sample.ids) for sample in samples)]).tolist()
        with file_lock(folder / ".lock", self.poll):
            if (whole := _read(folder / _WHOLE, bounds[-1])) is None:
                self._score(frozen, samples, folder)
                whole = _read(folder / _WHOLE, bounds[-1])
                assert whole is not None  # just written
            for part in folder.glob("part-*"):
                part.unlink()
        return [whole[start:end] for start, end in pairwise(bounds)]

    def _digest(self, frozen: Frozen, digests: Sequence[str], samples: Sequence[Sample]) -> str:
        facts = ["3", frozen.column, *digests, self._precision, self._sequence_length, PART]
        total = hashlib.sha256(json.dumps(facts).encode())
        for sample in samples:
            total.update(len(sample.ids).to_bytes(8, "big") + sample.ids.tobytes())
        return total.hexdigest()

    def _score(self, frozen: Frozen, samples: Sequence[Sample], folder: Path) -> None:
        """Write what is missing, part by part, then all in one file."""
        for left in folder.glob(f"{TEMPORARY_PREFIX}*"):
            left.unlink()  # of a process that was killed: we have the lock
        parts = [
            (folder / f"part-{start}.npy", samples[start : start + PART]) for start in range(0, len(samples), PART)
        ]
        missing = [(path, some) for path, some in parts if _read(path, _tokens(some)) is None]
        if missing:
            log.info("%s reads %d samples", frozen.name, sum(len(some) for _, some in missing))
            with self._heartbeat.during("scores"):
                judge = frozen.load(self._device)
            with _Progress(self._console, sum(len(some) for _, some in missing)) as progress:
                for path, some in missing:
                    _write(path, self._judged(frozen, judge, some))
                    progress.advance(len(some), _tokens(some))
            del judge
            if self._device.type == "cuda":
                torch.cuda.empty_cache()  # the policy needs the room
        _write(folder / _WHOLE, np.concatenate([np.load(path) for path, _ in parts]))

    def _judged(self, frozen: Frozen, judge: Judge, samples: Sequence[Sample]) -> npt.NDArray[np.float32]:
        """The scores of some samples, one after the other."""
        lengths = [len(sample.ids) for sample in samples]
        found: dict[int, npt.NDArray[np.float32]] = {}
        for row in pack(range(len(samples)), lengths, self._sequence_length):
            self.poll()
            used = sum(lengths[index] for index in row)
            batch = collate([[samples[index] for index in row]], used, pad_id=0).to(self._device)
            with torch.no_grad(), autocast(self._device, self._precision):
                scores = judge(batch)[0].float().cpu().numpy()
            if not np.isfinite(scores).all():
                raise InputError(
                    f"{frozen.name} gives numbers that are not finite", where=frozen.key, fix="take another model"
                )
            found |= zip(row, np.split(scores, np.cumsum([lengths[index] for index in row])[:-1]), strict=True)
        return np.concatenate([found[index] for index in range(len(samples))])


class _Progress:
    """A bar on a terminal; lines in the log now and then."""

    def __init__(self, console: Console, total: int) -> None:
        self._bar = StepBar(console, total, 0, title="scoring")
        self._total, self._done, self._tokens = total, 0, 0
        self._begun = self._shown = time.monotonic()

    def advance(self, samples: int, tokens: int) -> None:
        self._done += samples
        self._tokens += tokens
        now = time.monotonic()
        note = f"{self._tokens / max(now - self._begun, 1e-9):,.0f} tokens/s"
        self._bar.update(self._done, note)
        if now - self._shown >= _LINE_SECONDS or (self._done == self._total and self._shown > self._begun):
            self._shown = now
            log.info("scored %d of %d samples  %s", self._done, self._total, note)

    def __enter__(self) -> Self:
        self._bar.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.__exit__(None, None, None)


def _tokens(samples: Sequence[Sample]) -> int:
    return sum(len(sample.ids) for sample in samples)


def _read(path: Path, size: int) -> npt.NDArray[np.float32] | None:
    """The mapped file, None where it is not there or not what was asked for."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return np.asarray(found) if found.dtype == np.float32 and found.shape == (size,) else None


def _write(path: Path, scores: npt.NDArray[np.float32]) -> None:
    with atomic_path(path) as written, written.open("wb") as file:
        np.save(file, scores)
