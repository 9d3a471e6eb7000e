"""Warnings that would come too often: a bucket that is away for hours is worth one line a minute."""

import logging
import threading
import time
from collections.abc import Callable

_SECONDS = 60.0


class Seldom:
    """Logs a warning of each kind at most once a minute, and says then how many were left out. Thread-safe."""

    def __init__(
        self, log: logging.Logger, seconds: float = _SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._log = log
        self._seconds = seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._last: dict[str, tuple[float, int]] = {}  # when it was said, how often it was not since

    def warn(self, kind: str, message: str, *arguments: object) -> None:
        """Log the warning, unless one of that kind was logged within the last minute."""
        with self._lock:
            said, left_out = self._last.get(kind, (None, 0))
            now = self._clock()
            if said is not None and now - said < self._seconds:
                self._last[kind] = (said, left_out + 1)
                return
            self._last[kind] = (now, 0)
        more = f" ({left_out} like this were left out)" if left_out else ""
        self._log.warning(message + "%s", *arguments, more)
