"""Which job is copied, waits, and is written: what the training's thread, the copier and the writer agree on."""

import logging
import threading
import time
from collections.abc import Callable

from wmtp_worker.checkpoint.jobs import ExportJob, Job, SaveJob
from wmtp_worker.storage.layout import step_name

log = logging.getLogger(__name__)

_TICK_SECONDS = 1.0


class Queue:
    """Jobs on their way: asked for, being copied, staged, being written. Thread-safe.

    A newer job takes the place of one of its kind that waits to be written; with `replaces=False` (several ranks,
    which could disagree about what waits) a save never does. A save waits for every export that is asked for: it may
    name one that was begun before it.
    """

    def __init__(self, replaces: bool, tick: Callable[[], object]) -> None:
        self._replaces, self._tick = replaces, tick
        self._changed = threading.Condition()
        self._asked: list[Job] = []
        self._copying: Job | None = None
        self._staged: list[Job] = []
        self._writing: Job | None = None
        self._held = False
        self._closing = False
        self._awaited = False
        self._moves = 0  # changes whenever something gets on
        self._next_tick = 0.0

    # --- for the training's thread -----------------------------------------------------------------------------

    def ask(self, job: Job) -> None:
        """To be copied, then written."""
        with self._changed:
            self._asked.append(job)
            self._changed.notify_all()

    def hold(self) -> list[Job]:
        """Begin no save until `release`. Those that are not even copied are forgotten, and returned."""
        with self._changed:
            self._held = True
            forgotten: list[Job] = [job for job in self._asked if isinstance(job, SaveJob)]
            self._asked = [job for job in self._asked if job not in forgotten]
            return forgotten

    def release(self) -> None:
        with self._changed:
            self._held = False
            self._changed.notify_all()

    def drop_saves(self, newer: int) -> None:
        """Of those that wait to be written, because step `newer` came first."""
        with self._changed:
            for job in self._saves():
                self._drop(job, newer)

    def close(self) -> None:
        """Let both threads end once nothing is left to do."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def wait_for_copies(self) -> None:
        self._wait(lambda: self._copying is None and not self._asked)

    def wait_until_idle(self, seconds: float | None = None) -> bool:
        """Until nothing is written or about to be, at most `seconds`; whether that is so. After `wait_for_copies`."""
        return self._wait(lambda: self._writing is None and self._next() is None, seconds)

    def _wait(self, ready: Callable[[], bool], seconds: float | None = None) -> bool:
        self._awaited = True
        try:
            return self._ticking(ready, seconds)
        finally:
            self._awaited = False

    def _ticking(self, ready: Callable[[], bool], seconds: float | None) -> bool:
        with self._changed:
            self._changed.notify_all()
        end = None if seconds is None else time.monotonic() + seconds
        seen = self._moves
        while True:
            left = _TICK_SECONDS if end is None else min(_TICK_SECONDS, end - time.monotonic())
            with self._changed:
                if self._changed.wait_for(ready, max(left, 0)):
                    return True
            if end is not None and time.monotonic() >= end:
                return False
            if seen != self._moves:  # a writer that hangs must not look like a run that gets on
                seen = self._moves
                self._tick()

    @property
    def saves(self) -> list[SaveJob]:
        """All that are not written yet."""
        with self._changed:
            return [job for job in self._unfinished() if isinstance(job, SaveJob)]

    @property
    def writing(self) -> Job | None:
        return self._writing

    @property
    def before_now(self) -> int:
        """Bytes to be written until a queue that is held is idle."""
        with self._changed:
            jobs = self._unfinished()
            return sum(job.remaining for job in jobs if job is self._writing or isinstance(job, ExportJob))

    def _unfinished(self) -> list[Job]:
        every = (*self._asked, self._copying, *self._staged, self._writing)
        return [job for job in every if job is not None]

    # --- for the two other threads -----------------------------------------------------------------------------

    def moved(self, tell: bool = False) -> None:
        """Something got on; `tell` whoever watches, at most once a second: where it is the training that waits."""
        self._moves += 1
        if tell and (now := time.monotonic()) >= self._next_tick:
            self._next_tick = now + _TICK_SECONDS
            self._tick()

    def rest(self, seconds: float) -> None:
        """For the writer: wait so long, but not while the training waits, or another save."""
        with self._changed:
            self._changed.wait_for(self._is_urgent, seconds)

    def _is_urgent(self) -> bool:
        return self._awaited or self._closing or bool(self._asked) or bool(self._saves())

    def next_to_copy(self) -> Job | None:
        """Wait for a job, and for buffers to copy it to; None when there is nothing left to do."""
        with self._changed:
            while True:
                if (job := next(filter(self._has_place, self._asked), None)) is not None:
                    self._asked.remove(job)
                    self._copying = job
                    job.take()
                    return job
                if self._closing and not self._asked:
                    return None
                self._changed.wait()

    def _has_place(self, job: Job) -> bool:
        waiting = [other for other in self._staged if type(other) is type(job)]
        if not job.can_start and waiting and (self._replaces or isinstance(job, ExportJob)):
            self._drop(waiting[0], job.step)
        return job.can_start

    def copied(self, job: Job, whole: bool) -> None:
        """The copier is done with it; it is written only if its copy is `whole`."""
        with self._changed:
            if whole:
                self._staged.append(job)
            else:
                job.give_back()
            self._copying = None
            self._moves += 1
            self._changed.notify_all()

    def next_to_write(self) -> Job | None:
        """Wait for a copy; None when there is nothing left to do."""
        with self._changed:
            while True:
                if (job := self._next()) is not None:
                    self._writing = job
                    self._staged.remove(job)
                    if isinstance(job, SaveJob) and self._replaces:
                        for older in self._saves():
                            self._drop(older, job.step)
                    return job
                if self._closing and not self._asked and self._copying is None:
                    return None
                self._changed.wait()

    def _next(self) -> Job | None:
        exports = [job for job in self._staged if isinstance(job, ExportJob) and not job.tried]
        if exports:
            return exports[0]
        to_come = any(isinstance(job, ExportJob) for job in (*self._asked, self._copying))
        saves = [] if self._held or to_come else self._saves()
        if not saves:
            return None
        return saves[-1] if self._replaces else saves[0]

    def _saves(self) -> list[Job]:
        return [job for job in self._staged if isinstance(job, SaveJob)]

    def written(self, job: Job) -> None:
        """The writer is done with it. An export for which there was no room waits for the next save."""
        with self._changed:
            if isinstance(job, SaveJob):  # it may have made room
                for export in self._staged:
                    if isinstance(export, ExportJob):
                        export.tried = False
            if isinstance(job, ExportJob) and job.tried:
                self._staged.append(job)
            else:
                job.give_back()
            self._writing = None
            self._moves += 1
            self._changed.notify_all()

    def _drop(self, job: Job, newer: int) -> None:
        log.info("%s is not written: %s came first", job.name, step_name(newer))
        self._staged.remove(job)
        job.give_back()
