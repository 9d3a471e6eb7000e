"""What all transfers of one process share: bytes in memory, and bytes a second on the wire."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Heed = Callable[[], None]  # raises where the work was stopped; called at least every POLL seconds while waiting
POLL = 0.1


class MemoryBudget:
    """At most `limit` bytes held at once, given out in the order asked for. One piece larger than that goes alone."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()  # in their order, so that small pieces cannot starve a large one

    @contextmanager
    def hold(self, size: int, heed: Heed) -> Iterator[None]:
        """Wait until `size` bytes are free, and hold them."""
        with self._changed:
            if self._waiting or not self._fits(size):
                self._wait(size, heed)
            self._used += size
        try:
            yield
        finally:
            with self._changed:
                self._used -= size
                if self._waiting:
                    self._changed.notify_all()

    def _fits(self, size: int) -> bool:
        return not self._used or self._used + size <= self._limit

    def _wait(self, size: int, heed: Heed) -> None:
        ticket = object()
        self._waiting.append(ticket)
        try:
            while self._waiting[0] is not ticket or not self._fits(size):
                self._changed.wait(POLL)
                heed()
        finally:
            self._waiting.remove(ticket)
            self._changed.notify_all()


class Bandwidth:
    """A token bucket: on average no more than `rate` bytes a second, both directions together; 0 does not limit.

    Whoever takes more than there is goes into debt and waits it out first, so parts of any size pass.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._lock = threading.Lock()
        self._due = 0.0  # monotonic time at which the debt is paid

    def take(self, size: int, heed: Heed) -> None:
        """Wait until `size` bytes may go."""
        if not self._rate:
            return
        with self._lock:
            start = max(self._due, time.monotonic())
            self._due = start + size / self._rate
            due = self._due
        while (rest := due - time.monotonic()) > 0:
            time.sleep(min(rest, POLL))
            heed()
