"""Threads that make the requests, and groups of tasks that succeed or stop together."""

import queue
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from wmtp_worker.errors import StorageError
from wmtp_worker.storage.transfer.limits import POLL, Heed

Task = Callable[[], None]
# seconds that a stop waits for requests on their way; after that they end by their own time-outs, without effect
GRACE = 5.0
# tasks whose quickest tells how far the server is, and what one costs this machine, about
_WINDOW = 64
_CPU_SECONDS = 0.001


class Stopped(Exception):
    """Ends a task whose group was stopped, because of `reason`."""

    def __init__(self, reason: BaseException) -> None:
        super().__init__()
        self.reason: BaseException = reason.reason if isinstance(reason, Stopped) else reason


class Pool:
    """Up to `size` threads, started when needed. They are daemons: a socket that hangs cannot keep the process.

    More than a few are started only where requests take long without keeping this machine busy: one that takes 50 ms
    at its quickest waits for a distant server, and 50 threads do as much as its CPU can. Near a server that answers in
    3 ms they would only be in each other's way.
    """

    def __init__(self, size: int, name: str, first: int = 16) -> None:
        self.size = size
        self._allowed = min(first, size)
        self._quickest: list[float] = []
        self._name = name
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._pending = 0
        self._closed = False

    def submit(self, task: Task) -> None:
        """Queue a task; it must not raise. Raises `StorageError` once the pool is closed."""
        with self._lock:
            if self._closed:
                raise StorageError("the transfer was closed while it was under way", fix="close it afterwards")
            self._pending += 1
            if self._pending > len(self._threads) < self._allowed:
                thread = threading.Thread(target=self._work, name=f"{self._name}-{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()
            self._tasks.put(task)

    def close(self) -> None:
        """End the threads, waiting up to `GRACE` seconds for them."""
        with self._lock:
            self._closed = True
            threads, self._threads = self._threads, []
        for _ in threads:
            self._tasks.put(None)
        deadline = time.monotonic() + GRACE
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            started = time.perf_counter()
            task()
            del task  # or its data would live until the next one comes
            with self._lock:
                self._pending -= 1
                self._learn(time.perf_counter() - started)

    def _learn(self, seconds: float) -> None:
        if self._allowed < self.size:
            self._quickest.append(seconds)
            if len(self._quickest) == _WINDOW:
                wanted = int(min(self._quickest) / _CPU_SECONDS)
                self._allowed = min(max(self._allowed, wanted), self.size)
                self._quickest.clear()


class Group:
    """Tasks of one pool that belong together: the first error stops the rest. A context manager.

    Leaving it waits for all and raises the first error. `check` is polled in the thread that submits and waits, and may
    raise to stop everything. No more than a few tasks wait at once, so a plan of any length takes no memory.
    """

    def __init__(self, pool: Pool, check: Heed) -> None:
        self._pool = pool
        self._check = check
        self._limit = 4 * pool.size
        # whoever submits is woken when half of them are done, not for each
        self._refill = self._limit // 2
        self._changed = threading.Condition()
        self._unfinished = 0
        self._error: BaseException | None = None
        self._last: list[Callable[[], None]] = []
        self._left = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.wait()
        except BaseException as stop:
            self.fail(stop)
            raise
        finally:
            if error is not None:
                self.fail(error)
            self._settle()

    def submit(self, task: Task, pool: Pool | None = None) -> None:
        """Run `task` in the group's pool, or another; waits while enough others do."""
        with self._changed:
            if self._unfinished >= self._limit:
                while self._unfinished > self._refill and self._error is None:
                    self._changed.wait(POLL)
                    self._check()
            self._raise()
            self._unfinished += 1
        try:
            (pool or self._pool).submit(lambda: self._run(task))
        except StorageError:
            with self._changed:
                self._unfinished -= 1
            raise

    def wait(self) -> None:
        """Until every task has ended. Raises the first error."""
        with self._changed:
            while self._unfinished and self._error is None:
                self._changed.wait(POLL)
                self._check()
            self._raise()

    def heed(self) -> None:
        """Raise `Stopped` where the group was stopped; for tasks, between two steps and while they wait."""
        if self._error is not None:
            raise Stopped(self._error)

    def fail(self, error: BaseException) -> None:
        """Stop the group; the first error stays."""
        with self._changed:
            if self._error is None:
                self._error = error
            self._changed.notify_all()

    def at_last(self, action: Callable[[], None]) -> None:
        """Run `action` when no task is running any more: on leaving, or when the last straggler ends."""
        self._last.append(action)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self, task: Task) -> None:
        try:
            if self._error is None:
                task()
        except Stopped:
            pass
        except BaseException as error:
            self.fail(error)
        finally:
            with self._changed:
                self._unfinished -= 1
                if self._unfinished in (self._refill, 0):
                    self._changed.notify_all()
                straggler = self._unfinished == 0 and self._left
            if straggler:
                self._finish()

    def _settle(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._unfinished == 0, timeout=GRACE)
            self._left = True
            idle = self._unfinished == 0
        if idle:
            self._finish()

    def _finish(self) -> None:
        while self._last:
            self._last.pop()()
