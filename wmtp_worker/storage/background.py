"""Uploads behind the training: a thread that owns a bounded queue, and never raises into the loop."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from wmtp_worker.errors import Interrupted, WorkerError
from wmtp_worker.storage.seldom import Seldom

log = logging.getLogger(__name__)

_RETRY_SECONDS = 30.0
_GRACE_SECONDS = 5.0


@dataclass(frozen=True, eq=False)
class _Job:
    slot: str
    name: str
    work: Callable[[], None]
    optional: bool

    @property
    def complaint(self) -> str:
        return "%s failed: %s" if self.optional else "%s is not in the bucket yet, kept locally: %s"


class Background:
    """Jobs, one after the other, in a thread of their own.

    Each job has a slot ("checkpoint", "logs", …), and each slot holds one waiting job: the newest replaces the one
    before it, so the queue is bounded and what is uploaded is what is worth most. A job that fails is tried again
    later and at the end; until it succeeds, its name is not safe.
    """

    def __init__(self, retry_seconds: float = _RETRY_SECONDS) -> None:
        self._retry_seconds = retry_seconds
        self._seldom = Seldom(log)
        self._changed = threading.Condition()
        self._waiting: dict[str, _Job] = {}
        self._failed: dict[str, tuple[_Job, str, float]] = {}
        self._active: _Job | None = None
        self._closing = False
        self._cancelled = False
        self._last_reason: dict[_Job, str] = {}  # of those tried once more while closing
        self._thread = threading.Thread(target=self._run, name="uploads", daemon=True)
        self._thread.start()

    def submit(self, slot: str, name: str, work: Callable[[], None], *, optional: bool = False) -> None:
        """Queue a job and return at once. An optional one is tried once, and is never missed."""
        with self._changed:
            failed = self._failed.pop(slot, None)
            before = self._waiting.get(slot) or (failed and failed[0])
            if before is not None and before.name != name:
                log.info("%s is not uploaded any more: %s takes its place", before.name, name)
            self._waiting[slot] = _Job(slot, name, work, optional)
            self._changed.notify_all()

    @property
    def pending(self) -> dict[str, str]:
        """Name to reason of everything that is not safe yet."""
        with self._changed:
            names = {job.name: "still waiting" for job in self._waiting.values() if not job.optional}
            names |= {job.name: reason for job, reason, _ in self._failed.values()}
            if self._active is not None and not self._active.optional:
                names[self._active.name] = self._last_reason.get(self._active, "not finished")
            return names

    def check(self) -> None:
        """Raises `Interrupted` when the time to finish is over. For the transfers that the jobs make."""
        if self._cancelled:
            raise Interrupted("the time to finish the uploads is over")

    def close(self, seconds: float, tick: Callable[[], None] = lambda: None) -> dict[str, str]:
        """Finish what is queued, try once more what failed, for at most `seconds`; then stop and join the thread.

        `tick` is called about once a second meanwhile; what it raises ends the waiting and is raised. Returns name and
        reason of what is not safe. A thread that hangs in the network is left behind after a few seconds.
        """
        with self._changed:
            self._closing = True
            for slot, (job, reason, _) in self._failed.items():
                self._last_reason[job] = reason
                self._waiting.setdefault(slot, job)
            self._failed.clear()
            jobs = (self._active, *self._waiting.values())
            left = [job.name for job in jobs if job is not None]
            self._changed.notify_all()
        if left:
            log.info("waiting up to %.0f s for %s", seconds, ", ".join(left))
        deadline = time.monotonic() + seconds
        try:
            while self._thread.is_alive() and (left_seconds := deadline - time.monotonic()) > 0:
                self._thread.join(min(1.0, left_seconds))
                tick()
        finally:
            self._cancelled = True
            self._thread.join(_GRACE_SECONDS)
        return self.pending

    @property
    def stuck(self) -> bool:
        """Whether the thread was left behind by `close`."""
        return self._closing and self._thread.is_alive()

    def _run(self) -> None:
        while (job := self._next()) is not None:
            reason = self._attempt(job)
            with self._changed:
                self._active = None
                if reason is not None and not job.optional and job.slot not in self._waiting:
                    self._failed_once(job, reason)
                self._changed.notify_all()

    def _failed_once(self, job: _Job, reason: str) -> None:
        # one that was replaced meanwhile is nobody's concern any more
        if self._closing and not self._cancelled and job not in self._last_reason:
            self._last_reason[job] = reason
            self._waiting[job.slot] = job
        else:
            self._failed[job.slot] = (job, reason, time.monotonic() + self._retry_seconds)

    def _next(self) -> _Job | None:
        """Wait for a job; None when there is nothing left to do."""
        with self._changed:
            while True:
                if self._cancelled:
                    return None
                if self._waiting:
                    self._active = self._waiting.pop(next(iter(self._waiting)))
                    return self._active
                if self._closing:
                    return None
                now = time.monotonic()
                for slot, (job, _, due) in list(self._failed.items()):
                    if due <= now:
                        self._waiting[slot] = job
                        del self._failed[slot]
                if not self._waiting:
                    soonest = min((due for _, _, due in self._failed.values()), default=None)
                    self._changed.wait(None if soonest is None else max(0.0, soonest - now))

    def _attempt(self, job: _Job) -> str | None:
        """Do one job; the reason where it did not succeed."""
        try:
            job.work()
        except Interrupted as error:
            return error.what
        except (WorkerError, OSError) as error:
            # while a bucket is away each attempt fails in the same way
            self._seldom.warn(job.slot, job.complaint, job.name, error)
            return str(error)
        except Exception as error:  # a bug must not end the training either
            log.exception(job.complaint, job.name, "by a bug")
            return f"{type(error).__name__}: {error}"
        return None
