"""`heartbeat.json`: written while the worker makes progress, so that a container's health check can tell."""

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wmtp_worker.storage.atomic import temporary

_INTERVAL = 2.0  # seconds


class Heartbeat:
    """Replaces the file atomically, at most every two seconds unless the phase changes.

    Not synced to the disk: it says that a process is alive, which a crash makes untrue anyway.
    """

    def __init__(self, path: Path, run: str, beaten: Callable[[], object] = lambda: None) -> None:
        """`beaten` is called with each beat, written or not."""
        self._path = path
        self._beaten = beaten
        self._run = run
        self._phase = ""
        self._written = 0.0

    def beat(self, phase: str, **facts: Any) -> None:
        """Say that `phase` goes on; `facts` (step, loss, …) are whatever helps somebody who looks."""
        self._beaten()
        if phase == self._phase and time.monotonic() - self._written < _INTERVAL:
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
