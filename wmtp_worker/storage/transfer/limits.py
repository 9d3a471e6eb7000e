"""What all transfers of one process share: bytes in memory, and bytes a second on the wire."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Heed = Callable[[], None]  # raises where the work was stopped; called at least every POLL seconds while waiting
POLL = 0.1


class MemoryBudget:
    """At most `limit` bytes held at once, given out in the order asked for. One piece larger than that goes alone."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._turn = threading.Lock()  # held by who is next, so that small pieces cannot starve a large one
        self._freed = threading.Condition()

    @contextmanager
    def hold(self, size: int, heed: Heed) -> Iterator[None]:
        """Wait until `size` bytes are free, and hold them."""
        with self._turn, self._freed:
            while self._used and self._used + size > self._limit:
                self._freed.wait(POLL)
                heed()
            self._used += size
        try:
            yield
        finally:
            with self._freed:
                self._used -= size
                self._freed.notify()


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
