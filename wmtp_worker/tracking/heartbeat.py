"""`heartbeat.json`: written while the worker makes progress, so that a container's health check can tell."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from wmtp_worker.storage.atomic import temporary

_INTERVAL = 2.0  # seconds
_LONGEST_CALL = 3600.0


class Heartbeat:
    """Replaces the file atomically, at most every two seconds unless the phase changes.

    Not synced to the disk: it says that a process is alive, which a crash makes untrue anyway. Thread-safe.
    """

    def __init__(self, path: Path | None, run: str, beaten: Callable[[], object] = lambda: None) -> None:
        """`beaten` is called with each beat, written or not. Without a path nothing is written."""
        self._path = path
        self._beaten = beaten
        self._run = run
        self._phase = ""
        self._written = 0.0
        self._lock = threading.Lock()  # the file that is written has one name

    def beat(self, phase: str, **facts: Any) -> None:
        """Say that `phase` goes on; `facts` (step, loss, …) are whatever helps somebody who looks."""
        self._beaten()
        with self._lock:
            if phase != self._phase or time.monotonic() - self._written >= _INTERVAL:
                self._write(phase, facts)

    @contextlib.contextmanager
    def during(self, phase: str, **facts: Any) -> Iterator[None]:
        """Beat while the block runs, for one call that takes long and cannot beat itself; for an hour at most."""
        done = threading.Event()
        end = time.monotonic() + _LONGEST_CALL

        def beat() -> None:
            while not done.wait(_INTERVAL) and time.monotonic() < end:
                self.beat(phase, **facts)

        self.beat(phase, **facts)
        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _write(self, phase: str, facts: Mapping[str, Any]) -> None:
        if self._path is None:
            return
        document = {"time": time.time(), "run": self._run, "phase": phase, **facts}
        written = temporary(self._path)
        try:
            written.write_text(json.dumps(document) + "\n", encoding="utf-8")
            written.replace(self._path)
        except OSError:
            # a full disk is reported by what must be written; this must not
            with contextlib.suppress(OSError):  # the disk may have become read-only
                written.unlink(missing_ok=True)
        self._phase, self._written = phase, time.monotonic()
