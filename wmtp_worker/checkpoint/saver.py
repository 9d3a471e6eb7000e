"""Saves behind the training.

    saver = Saver(paths, written=publish_and_prune)
    saver.prepare(tensors)              # takes the host memory, and says how much
    ...
    saver.save(snapshot)                # returns at once
    forward, backward
    saver.gate()                        # the copy is complete: from here on the tensors may change
    optimizer.step()

Two threads work for it. The copier copies the tensors into host memory while forward and backward go on. The writer,
at a low priority, hashes and writes what was copied. With two buffers one save is being written and one may
wait; a newer one takes the place of the one that waits. Where no copy fits into memory, or with `background=False`,
`save` itself writes, by the same code.

`export` is the same for the weights of `best_model.pt`. No save that was begun after it is on the disk before it, so
what a checkpoint says of the best model is never ahead of the file.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from wmtp_worker.checkpoint import store
from wmtp_worker.checkpoint.export import save_weights
from wmtp_worker.checkpoint.jobs import WEIGHTS, Cost, ExportJob, Job, SaveJob
from wmtp_worker.checkpoint.lowly import Pace, step_back, waiting
from wmtp_worker.checkpoint.queue import Queue
from wmtp_worker.checkpoint.ranks import ALONE, Ranks
from wmtp_worker.checkpoint.shared import SharedTensors
from wmtp_worker.checkpoint.snapshot import Kind, Snapshot
from wmtp_worker.checkpoint.staging import Buffers, Content, affordable, nbytes
from wmtp_worker.checkpoint.tensorfile import Tensors
from wmtp_worker.errors import DiskFullError
from wmtp_worker.storage.layout import RunPaths

log = logging.getLogger(__name__)

T = TypeVar("T")

# bytes; what is smaller is over in a moment anyway
_WORTH_A_PACE = 32 << 20


class Saver:
    """Writes the checkpoints of one run, in the background if it can.

    `written(step, folder)` is called once a checkpoint is on the disk, `make_room()` when the disk is full, both on
    rank 0 alone and in the writer's thread while nothing is being written, so both may prune. `inspect(step, tensors
    by file)` sees the copies before they are written. `tick()` is called about once a second while the caller's thread
    waits, but only as long as something gets on; what it raises ends the waiting.

    A full disk never ends the training: room is made, it is tried once more, then the save is skipped with a warning;
    an export is kept, and tried again after each save. What else the writer raises is raised by the next `save` or
    `flush`. With several ranks every rank must make the same calls, and the next save waits rather than take the place
    of one that waits.
    """

    def __init__(
        self,
        paths: RunPaths,
        *,
        background: bool = True,
        buffers: int = 2,
        ranks: Ranks = ALONE,
        written: Callable[[int, Path], object] = lambda step, folder: None,
        make_room: Callable[[], object] = lambda: None,
        inspect: Callable[[int, Mapping[str, Tensors]], object] = lambda step, tensors: None,
        tick: Callable[[], object] = lambda: None,
    ) -> None:
        self._paths, self._ranks = paths, ranks
        self._written, self._make_room, self._inspect = written, make_room, inspect
        self._wanted = buffers if background else 0
        self._prepared = False
        self._free: list[Buffers] = []
        self._free_for_exports: list[Buffers] = []
        self._shared = SharedTensors()
        # several ranks could disagree about which save waits
        self._queue = Queue(replaces=ranks.world == 1, tick=tick)
        self._ungated: list[Job] = []
        self._unstaged: list[Job] = []  # there was no memory for a copy
        self._error: BaseException | None = None
        self._threads: list[threading.Thread] = []
        self._last: SaveJob | None = None

    # --- for the training --------------------------------------------------------------------------------------

    def prepare(self, tensors: Mapping[str, Tensors], exported: Tensors | None = None, to_come: int = 0) -> int:
        """Take the host memory for copies of these tensors (meta tensors will do); returns its size in bytes.

        `exported` are those that `export` will be given. `to_come` bytes of host memory are left for what the training
        itself will need. 0: each save blocks, because that is wanted, or because memory cannot hold one copy, which is
        warned about.
        """
        contents = store.contents_of(Snapshot(0, tensors, {}), self._ranks)
        weights = {WEIGHTS: Content(exported)} if exported else {}
        size, extra = nbytes(contents), nbytes(weights)
        count = affordable(size, self._wanted, self._ranks.world, extra, to_come) if self._wanted else 0
        self._prepared = True
        self._free[:] = [Buffers() for _ in range(count)]
        self._free_for_exports[:] = [Buffers() for _ in range(min(count, 1))]
        for buffers in self._free:
            buffers.lay_out(contents)
        for buffers in self._free_for_exports:
            buffers.lay_out(weights)
        if count and not self._threads:
            for name, work in (("copies", self._copy_all), ("saves", self._write_all)):
                self._threads.append(threading.Thread(target=work, name=name, daemon=True))
                self._threads[-1].start()
        return count * size + min(count, 1) * extra

    def save(self, snapshot: Snapshot, since: float | None = None) -> None:
        """Begin a save and return. No tensor in it may change before `gate`; the rest is taken by value now.

        Its pause counts from `since`, on `time.perf_counter`'s clock. Raises what the writer of an earlier save raised.
        """
        since = time.perf_counter() if since is None else since
        if any(isinstance(job, SaveJob) for job in self._ungated):
            self.gate()
        self._raise_error()
        if not self._prepared:
            self.prepare(snapshot.tensors)
        save = SaveJob(snapshot, self._free, since)
        self._begin(save)
        if self._threads:
            save.goes_on()

    def export(self, path: Path, step: int, tensors: Tensors, facts: Mapping[str, Any]) -> None:
        """Begin to write these weights to `path`, as `save_weights` does, and return. As with `save`, until `gate` no
        tensor may change, and what the writer of an earlier save raised is raised. A full disk is warned about.
        """
        if any(isinstance(job, ExportJob) for job in self._ungated):
            self.gate()
        self._raise_error()
        self._begin(ExportJob(path, step, tensors, facts, self._free_for_exports))

    def _begin(self, job: Job) -> None:
        if not self._threads:
            self._do(job)
            return
        self._ungated.append(job)
        self._queue.ask(job)

    def gate(self) -> None:
        """Wait until every tensor of the last `save` and `export` is copied: before anything changes one.

        On a CUDA device the copies are only queued before what comes next: the host does not wait for them.
        """
        if not self._ungated:
            return
        started = time.perf_counter()
        self._queue.wait_for_copies()
        jobs, self._ungated = self._ungated, []
        unstaged, self._unstaged = self._unstaged, []
        if unstaged:  # two that write at once would disturb each other, and the older one might end last
            self._queue.wait_until_idle()
        for job in jobs:
            job.copies.wait()
            job.since = started
            if job in unstaged:
                self._do(job)
            else:
                job.goes_on()

    def flush(self, seconds: float | None = None) -> bool:
        """Wait, at most `seconds`, until all is on the disk that fits there; whether it is. Raises what the writer
        raised.
        """
        self.gate()
        idle = self._queue.wait_until_idle(seconds)
        self._raise_error()
        return idle

    def save_now(self, snapshot: Snapshot, kind: Kind = "full") -> Path:
        """Write a checkpoint in the caller's thread, at its priority, and return its folder: for an emergency.

        What is being written, and an export, are finished first (`before_now`), a save that waits is dropped. Where the
        same step is on the disk by then, that is all. `trainable` leaves the optimizer's state out. Raises
        `DiskFullError` where making room did not help.
        """
        since = time.perf_counter()
        if self._ranks.world == 1:  # several would not hold at the same save
            forgotten = self._queue.hold()  # what replaces it is read from the tensors themselves
            self._ungated = [job for job in self._ungated if job not in forgotten]
        try:
            self.gate()
            self._queue.wait_until_idle()
            self._raise_error()
            self._queue.drop_saves(snapshot.step)
            folder = self._paths.step(snapshot.step)
            if (last := self._last) and (last.step, last.cost.kind) == (snapshot.step, "full"):
                return folder
            save = SaveJob(snapshot if kind == "full" else snapshot.trainable_only(), self._free, since)
            self._tell(save, self._write(save))
            return folder
        finally:
            self._queue.release()

    def close(self) -> None:
        """Finish what is being saved, and join the threads. Errors are logged, not raised."""
        try:
            self.flush()
        except Exception as error:
            log.warning("the last save failed: %s", error)
        finally:
            self._queue.close()
            for thread in self._threads:
                thread.join()
            self._threads.clear()
            self._free.clear()
            self._free_for_exports.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pending(self) -> frozenset[int]:
        """Steps whose checkpoints are not on the disk yet."""
        return frozenset(save.step for save in self._queue.saves)

    @property
    def writing(self) -> int | None:
        """The step whose checkpoint is being written."""
        job = self._queue.writing
        return job.step if isinstance(job, SaveJob) else None

    @property
    def before_now(self) -> int:
        """Bytes that are still to be written before `save_now` can begin."""
        return self._queue.before_now

    @property
    def last(self) -> Cost | None:
        """The cost of the newest save that is on the disk."""
        return None if self._last is None else self._last.cost

    # --- behind the training -----------------------------------------------------------------------------------

    def _copy_all(self) -> None:
        while (job := self._queue.next_to_copy()) is not None:
            started, whole = time.perf_counter(), False
            try:
                assert job.buffers is not None
                job.look(self._ranks)
                job.buffers.lay_out(job.contents)
                job.buffers.fill(job.contents, job.copies)
                whole = True
            except (RuntimeError, MemoryError) as error:  # torch raises RuntimeError for memory it cannot have
                log.warning("no copy of %s can be made, the training waits for it: %s", job.name, error)
                self._unstaged.append(job)
            except BaseException as error:
                self._error = error
            if isinstance(job, SaveJob):
                job.cost.copy = time.perf_counter() - started
            self._queue.copied(job, whole)

    def _write_all(self) -> None:
        step_back()
        while (job := self._queue.next_to_write()) is not None:
            try:
                job.copies.synchronize()
                self._do(job)
            except BaseException as error:
                self._error = error
            self._queue.written(job)

    def _do(self, job: Job) -> None:
        if isinstance(job, ExportJob):
            self._export(job)
        elif isinstance(job, SaveJob):
            try:
                folder = self._write(job)
            except DiskFullError as error:
                log.warning("%s is NOT saved, the training goes on: %s", job.name, error)
            else:
                self._tell(job, folder)

    def _export(self, export: ExportJob) -> None:
        try:
            self._with_room(ALONE, export.name, lambda: self._write_weights(export))
            export.tried = False
        except DiskFullError as error:
            export.tried = True
            log.warning("%s is NOT saved, the training goes on: %s", export.name, error)

    def _write_weights(self, export: ExportJob) -> None:
        if export.buffers is None:
            export.look(self._ranks)
        export.done = 0
        save_weights(export.path, export.tensors, export.facts, self._heed(export, Pace(self._queue.rest)))

    def _write(self, save: SaveJob) -> Path:
        """Write one save; once more after room was made. Raises what `store.write` and `inspect` raise."""
        started, waited = time.perf_counter(), waiting()
        if save.buffers is None:
            save.look(self._ranks)
        save.cost.bytes = save.bytes
        staged = None if save.buffers is None else save.buffers.files
        live = {name: content.tensors for name, content in save.contents.items()}
        tensors = live if staged is None else {name: file.views for name, file in staged.items()}

        pace = Pace(self._queue.rest)

        def write() -> Path:
            with self._ranks.together():
                self._inspect(save.step, tensors)
            save.done = 0
            return store.write(
                self._paths,
                save.snapshot,
                ranks=self._ranks,
                staged=staged,
                shared=self._shared,
                heed=self._heed(save, pace),
                files_at_once=2 if staged is None else 1,
            )

        folder = self._with_room(self._ranks, save.name, write)
        save.cost.write = time.perf_counter() - started
        save.cost.busy = max(0.0, save.cost.write - (waiting() - waited) - pace.rested)
        return folder

    def _heed(self, job: Job, pace: Pace) -> Callable[[int], None]:
        """To be called with the size of each block."""
        inline = job.buffers is None
        paced = not inline and job.bytes > _WORTH_A_PACE

        def heed(size: int) -> None:
            job.done += size
            self._queue.moved(tell=inline)
            if paced:
                pace.keep()

        return heed

    def _with_room(self, ranks: Ranks, name: str, work: Callable[[], T]) -> T:
        try:
            return work()
        except DiskFullError as error:
            log.warning("%s is tried once more after making room: %s", name, error)
            with ranks.together():
                if ranks.first:
                    self._make_room()
            return work()

    def _tell(self, save: SaveJob, folder: Path) -> None:
        self._last = save
        if save.buffers is None:
            save.goes_on()
        cost = save.cost
        told = (save.name, cost.bytes / 1e6, 1e3 * cost.pause, cost.copy, cost.write)
        log.info("saved %s: %.1f MB, paused %.1f ms, copied in %.2f s, written in %.2f s", *told)
        save.let_go()
        with self._ranks.together():
            if self._ranks.first:
                self._written(save.step, folder)

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error
