"""Saves behind the training.

    saver = Saver(paths, written=publish_and_prune)
    saver.prepare(tensors)              # takes the host memory, and says how much
    ...
    saver.save(snapshot)                # returns at once
    forward, backward
    saver.gate()                        # the copy is complete: from here on the tensors may change
    optimizer.step()

Two threads work for it. The copier copies the tensors into host memory while forward and backward go on. The writer,
at a low priority, hashes and writes what was copied. One save is being written and one may wait; a newer one takes
the place of the one that waits. Where no copy fits into memory, or with `background=False`, `save` itself writes, by
the same code.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from wmtp_worker.checkpoint import store
from wmtp_worker.checkpoint.ranks import ALONE, Ranks
from wmtp_worker.checkpoint.shared import SharedTensors
from wmtp_worker.checkpoint.snapshot import Kind, Snapshot
from wmtp_worker.checkpoint.staging import Buffers, Content, Copies, affordable, nbytes
from wmtp_worker.checkpoint.tensorfile import Tensors
from wmtp_worker.errors import DiskFullError
from wmtp_worker.storage.layout import RunPaths, step_name

log = logging.getLogger(__name__)

# by the scheduler's weights 3 % of a core that the training wants too; at 19, 1.5 %, it would take twice as long there
_NICE = 15
_TICK_SECONDS = 1.0


@dataclass
class Cost:
    """What one save cost, in seconds: `pause` of the training's thread, and behind it the copy and the writing."""

    step: int
    bytes: int = 0
    pause: float = 0.0
    copy: float = 0.0
    write: float = 0.0


@dataclass(eq=False)
class _Save:
    snapshot: Snapshot
    contents: Mapping[str, Content] = field(default_factory=dict)
    copies: Copies = field(default_factory=Copies)
    buffers: Buffers | None = None
    done: int = 0  # bytes

    def __post_init__(self) -> None:
        self.cost = Cost(self.snapshot.step)

    @property
    def name(self) -> str:
        return step_name(self.snapshot.step)


class Saver:
    """Writes the checkpoints of one run, in the background if it can.

    `written(step, folder)` is called once a checkpoint is on the disk, `make_room()` when the disk is full, both on
    rank 0 alone and in the writer's thread while nothing is being written, so both may prune. `inspect(tensors by
    file)` sees the copies before they are written. `tick()` is called about once a second in the caller's thread while
    it waits; what it raises ends the waiting.

    A full disk never ends the training: room is made, it is tried once more, then the save is skipped with a warning
    and counted in `skipped`. What else the writer raises is raised by the next `save` or `flush`. With several ranks
    every rank must make the same calls, and the next save waits rather than take the place of one that waits.
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
        inspect: Callable[[Mapping[str, Tensors]], object] = lambda tensors: None,
        tick: Callable[[], object] = lambda: None,
    ) -> None:
        self._paths, self._ranks = paths, ranks
        self._written, self._make_room, self._inspect, self._tick = written, make_room, inspect, tick
        self._wanted = buffers if background else 0
        self._free: list[Buffers] | None = None  # None: not prepared yet
        self._shared = SharedTensors()
        self._changed = threading.Condition()
        self._asked: _Save | None = None  # to be copied
        self._copying: _Save | None = None
        self._staged: list[_Save] = []
        self._writing: _Save | None = None
        self._ungated: _Save | None = None
        self._unstaged: _Save | None = None  # there was no memory for its copy
        self._error: BaseException | None = None
        self._held = False  # the writer begins nothing new
        self._closing = False
        self._threads: list[threading.Thread] = []
        self._last: _Save | None = None
        self.skipped = 0

    # --- for the training --------------------------------------------------------------------------------------

    def prepare(self, tensors: Mapping[str, Tensors]) -> int:
        """Take the host memory for copies of these tensors (meta tensors will do); returns its size in bytes.

        0: each save blocks, because that is wanted, or because memory cannot hold one copy, which is warned about.
        """
        contents = store.contents_of(Snapshot(0, tensors, {}), self._ranks)
        size = nbytes(contents)
        count = affordable(size, self._wanted, self._ranks.world) if self._wanted else 0
        self._free = [Buffers() for _ in range(count)]
        for buffers in self._free:
            buffers.lay_out(contents)
        if count and not self._threads:
            for name, work in (("copies", self._copy_all), ("saves", self._write_all)):
                self._threads.append(threading.Thread(target=work, name=name, daemon=True))
                self._threads[-1].start()
        return count * size

    def save(self, snapshot: Snapshot) -> None:
        """Begin a save and return. No tensor in it may change before `gate`; the rest is taken by value now.

        Raises what the writer of an earlier save raised.
        """
        started = time.perf_counter()
        self.gate()
        self._raise_error()
        if self._free is None:
            self.prepare(snapshot.tensors)
        save = _Save(snapshot.by_value())
        if not self._threads:
            self._write_or_skip(save)
            save.cost.pause += time.perf_counter() - started
            return
        with self._changed:
            self._asked = self._ungated = save
            self._changed.notify_all()
        save.cost.pause += time.perf_counter() - started

    def gate(self) -> None:
        """Wait until every tensor of the last `save` is copied. To be called before anything changes one.

        On a CUDA device the copies are only queued before what comes next: the host does not wait for them.
        """
        if (save := self._ungated) is None:
            return
        started = time.perf_counter()
        self._wait(lambda: save not in (self._asked, self._copying))
        self._ungated = None
        save.copies.wait()
        if self._unstaged is save:
            self._unstaged = None
            self._write_or_skip(save)
        save.cost.pause += time.perf_counter() - started

    def flush(self, seconds: float | None = None) -> bool:
        """Wait, at most `seconds`, until all saves are on the disk; whether they are. Raises what the writer raised."""
        self.gate()
        idle = self._wait(lambda: not self._staged and self._writing is None, seconds)
        self._raise_error()
        return idle

    def save_now(self, snapshot: Snapshot, kind: Kind = "full") -> Path:
        """Write a checkpoint in the caller's thread, at its priority, and return its folder: for an emergency.

        The save that is being written is finished first, unless the same step is; one that waits is dropped.
        `trainable` leaves the optimizer's state out. Raises `DiskFullError` where making room did not help.
        """
        self._held = self._ranks.world == 1  # several ranks would not hold at the same save
        try:
            if self._held:
                with self._changed:
                    if self._asked is not None:  # not begun: what replaces it is read from the tensors themselves
                        self._asked = self._ungated = None
            self.gate()
            self._wait(lambda: self._writing is None and (self._held or not self._staged))
            self._raise_error()
            with self._changed:
                for save in self._staged:
                    self._drop(save, snapshot.step)
                self._staged.clear()
            folder = self._paths.step(snapshot.step)
            if (last := self._last) and (last.snapshot.step, last.snapshot.kind) == (snapshot.step, "full"):
                return folder
            self._write(_Save((snapshot if kind == "full" else snapshot.trainable_only()).by_value()))
            return folder
        finally:
            with self._changed:
                self._held = False
                self._changed.notify_all()

    def close(self) -> None:
        """Finish what is being saved, and join the threads. Errors are logged, not raised."""
        try:
            self.flush()
        except Exception as error:
            log.warning("the last save failed: %s", error)
        finally:
            with self._changed:
                self._closing = True
                self._changed.notify_all()
            for thread in self._threads:
                thread.join()
            self._threads.clear()
            self._free = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pending(self) -> frozenset[int]:
        """Steps that are not on the disk yet."""
        with self._changed:
            return frozenset(save.snapshot.step for save in self._unfinished())

    @property
    def remaining(self) -> int:
        """Bytes of them that are still to be written."""
        with self._changed:
            return sum(save.cost.bytes - save.done for save in self._unfinished())

    @property
    def last(self) -> Cost | None:
        """The cost of the newest save that is on the disk."""
        return None if self._last is None else self._last.cost

    # --- the copier --------------------------------------------------------------------------------------------

    def _copy_all(self) -> None:
        while (save := self._next_to_copy()) is not None:
            started = time.perf_counter()
            assert save.buffers is not None
            try:
                self._look_at(save)
                save.buffers.lay_out(save.contents)
                save.buffers.fill(save.contents, save.copies)
                save.cost.copy = time.perf_counter() - started
                staged = True
            except (RuntimeError, MemoryError) as error:  # torch raises RuntimeError for memory it cannot have
                log.warning("no copy of %s can be made, the training waits for it: %s", save.name, error)
                staged = False
            with self._changed:
                if staged:
                    self._staged.append(save)
                else:
                    self._unstaged = save
                    self._give_back(save)
                self._copying = None
                self._changed.notify_all()

    def _next_to_copy(self) -> _Save | None:
        """Wait for a save, and for a place to copy it to; None when there is nothing left to do."""
        with self._changed:
            while True:
                if self._asked is not None and (buffers := self._place(self._asked)) is not None:
                    self._copying, self._asked = self._asked, None
                    self._copying.buffers = buffers
                    return self._copying
                if self._closing:
                    return None
                self._changed.wait()

    def _place(self, save: _Save) -> Buffers | None:
        if not self._free and self._staged and self._ranks.world == 1:
            self._drop(self._staged.pop(0), save.snapshot.step)
        return self._free.pop() if self._free else None

    def _drop(self, save: _Save, newer: int) -> None:
        log.info("%s is not written: %s came first", save.name, step_name(newer))
        self._give_back(save)

    def _give_back(self, save: _Save) -> None:
        if save.buffers is not None and self._free is not None:
            self._free.append(save.buffers)
        save.buffers = None

    # --- the writer --------------------------------------------------------------------------------------------

    def _write_all(self) -> None:
        _lower_priority()
        while (save := self._next_to_write()) is not None:
            try:
                save.copies.synchronize()
                self._write_or_skip(save)
            except BaseException as error:
                self._error = error
            with self._changed:
                self._give_back(save)
                self._writing = None
                self._changed.notify_all()

    def _next_to_write(self) -> _Save | None:
        with self._changed:
            while True:
                if self._staged and not self._held:
                    if self._ranks.world == 1:
                        while len(self._staged) > 1:
                            self._drop(self._staged.pop(0), self._staged[-1].snapshot.step)
                    self._writing = self._staged.pop(0)
                    return self._writing
                if self._closing:
                    return None
                self._changed.wait()

    def _write_or_skip(self, save: _Save) -> None:
        try:
            self._write(save)
        except DiskFullError as error:
            self.skipped += 1
            log.warning("%s is NOT saved, the training goes on: %s", save.name, error)

    def _write(self, save: _Save) -> None:
        """Write one save; once more after room was made. Raises what `store.write` raises."""
        started = time.perf_counter()
        staged = None if save.buffers is None else save.buffers.files
        if staged is None:
            self._look_at(save)
            self._inspect({name: content.tensors for name, content in save.contents.items()})
        else:
            self._inspect({name: file.views for name, file in staged.items()})

        def heed(size: int) -> None:
            save.done += size

        def write() -> Path:
            save.done = 0
            return store.write(
                self._paths, save.snapshot, ranks=self._ranks, staged=staged, shared=self._shared, heed=heed
            )

        try:
            folder = write()
        except DiskFullError as error:
            log.warning("%s is tried once more after making room: %s", save.name, error)
            if self._ranks.first:
                self._make_room()
            folder = write()
        save.cost.write = time.perf_counter() - started
        self._last = save
        told = (save.name, save.cost.bytes / 1e6, 1e3 * save.cost.pause, save.cost.copy, save.cost.write)
        log.info("saved %s: %.1f MB, paused %.1f ms, copied in %.2f s, written in %.2f s", *told)
        # the tensors are not needed any more: let go of them
        save.snapshot, save.contents = replace(save.snapshot, tensors={}, frozen={}), {}
        if self._ranks.first:
            self._written(save.snapshot.step, folder)

    def _look_at(self, save: _Save) -> None:
        # not in `save`: with thousands of tensors this takes milliseconds
        save.contents = store.contents_of(save.snapshot, self._ranks)
        every = (value for content in save.contents.values() for value in content.tensors.values())
        save.cost.bytes = sum(value.nbytes for value in every)

    def _unfinished(self) -> list[_Save]:
        return [save for save in (self._asked, self._copying, *self._staged, self._writing) if save is not None]

    def _wait(self, ready: Callable[[], bool], seconds: float | None = None) -> bool:
        end = None if seconds is None else time.monotonic() + seconds
        while True:
            left = _TICK_SECONDS if end is None else min(_TICK_SECONDS, end - time.monotonic())
            with self._changed:
                if self._changed.wait_for(ready, max(left, 0)):
                    return True
            if end is not None and time.monotonic() >= end:
                return False
            self._tick()

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error


def _lower_priority() -> None:
    """Let this thread, and those it starts, run when nothing else wants the processor, as far as the system can."""
    if sys.platform == "linux":  # elsewhere it would be the whole process
        try:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        except OSError as error:
            log.debug("the writer's priority stays as it is: %s", error)
