"""`Watchdog`: ends a process that makes no progress any more, with all its stacks in the log, and exit code 75.

    with Watchdog(settings.host.hang_seconds, log_file=paths.training_log) as watchdog:
        watchdog.beat()                          # wherever the run gets on: a micro-batch, a validation, a wait

Only the run itself should beat: uploads behind the training go on happily while the training is stuck. A hang inside C
code that holds Python's lock cannot be seen from a Python thread; a health check that reads `heartbeat.json` sees it.
"""

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from wmtp_worker.errors import AGAIN

# seconds: for each part of the ending, which must not hang itself
_PART_SECONDS = 5.0
_LONGEST_TICK = 5.0


class Watchdog:
    """Off with `seconds` 0: then there is no thread, and `beat` does nothing that matters."""

    def __init__(self, seconds: float, *, log_file: Path | None = None) -> None:
        self._seconds = seconds
        self._log_file = log_file
        self._tick = min(_LONGEST_TICK, seconds / 10)
        self._last = time.monotonic()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self) -> None:
        """Say that the run made progress. From any thread, at the cost of reading a clock."""
        self._last = time.monotonic()

    def close(self) -> None:
        """End the watching and join its thread."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(_PART_SECONDS)

    def __enter__(self) -> Self:
        if self._seconds > 0:
            self.beat()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _watch(self) -> None:
        woken = time.monotonic()
        while not self._closing.wait(self._tick):
            before, woken = woken, time.monotonic()
            # the process was stopped, its machine slept, or a neighbour took all its time: nobody could beat
            if woken - before > 2 * self._tick + 1.0:
                self._last = woken
            elif woken - self._last > self._seconds:
                self._end()

    def _end(self) -> None:
        head = f"wmtp: no progress for {self._seconds:g} s: ending with exit code {AGAIN}; where every thread is:\n"
        for part in (lambda: _dump(2, head), lambda: _dump_to(self._log_file, head)):
            # in a thread of its own: what the process hangs on may be this disk, or whoever reads this pipe
            thread = threading.Thread(target=_quietly, args=(part,), name="watchdog", daemon=True)
            thread.start()
            thread.join(_PART_SECONDS)
        os._exit(AGAIN)


def _quietly(part: Callable[[], object]) -> None:
    with contextlib.suppress(Exception):
        part()


def _dump_to(path: Path | None, head: str) -> None:
    if path is None:
        return
    with open(path, "ab") as file:
        _dump(file.fileno(), head)
        file.flush()
        os.fsync(file.fileno())


def _dump(descriptor: int, head: str) -> None:
    os.write(descriptor, head.encode())
    faulthandler.dump_traceback(file=descriptor, all_threads=True)
