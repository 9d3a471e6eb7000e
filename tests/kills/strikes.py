"""One signal at one line: where in the worker's own code, in whichever thread, a process is struck."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import wmtp_worker

PACKAGE = Path(wmtp_worker.__file__).parent
# the parts of a save, and the rest of a run, by the files whose lines they run
PHASES: Mapping[str, tuple[str, ...]] = {
    "copy": ("checkpoint/staging.py", "checkpoint/saver.py", "checkpoint/snapshot.py"),
    "write": ("checkpoint/store.py", "checkpoint/tensorfile.py", "checkpoint/shared.py", "checkpoint/manifest.py"),
    "settle": ("storage/atomic.py", "training/saving.py", "checkpoint/ledger.py"),
    "upload": ("storage/transfer",),
    "publish": ("storage/publish.py", "storage/published.py", "storage/sealed.py", "storage/runs.py"),
    "retain": ("storage/retention.py",),
    "lease": ("storage/lease.py", "storage/lease_file.py"),
    "anywhere": ("",),
}


@dataclass(frozen=True)
class Strike:
    """Send `number` to this process when the `line`-th line of a phase is about to run."""

    phase: str
    line: int
    number: int = signal.SIGKILL


class _Tracer:
    """Counts the lines of one phase in all threads; calls `action` at the wanted one."""

    def __init__(self, phase: str, line: int, action: Callable[[], None]) -> None:
        self.lines = 0
        self._files = tuple(str(PACKAGE / name) for name in PHASES[phase])
        self._wanted = line
        self._action = action
        self._lock = threading.Lock()

    def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
        return self._on_line if frame.f_code.co_filename.startswith(self._files) else None

    def _on_line(self, frame: FrameType, event: str, argument: object) -> Any:
        if event == "line":
            with self._lock:
                self.lines += 1
                due = self.lines == self._wanted
            if due:
                self._action()
        return self._on_line


@contextmanager
def tracing(phase: str, line: int, action: Callable[[], None]) -> Iterator[_Tracer]:
    """Trace this thread and those that begin meanwhile."""
    tracer = _Tracer(phase, line, action)
    threading.settrace(tracer)
    sys.settrace(tracer)
    try:
        yield tracer
    finally:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]


def arm(strike: Strike) -> None:
    """Let this process strike itself; for the rest of its life."""
    tracer = _Tracer(strike.phase, strike.line, lambda: os.kill(os.getpid(), strike.number))
    threading.settrace(tracer)
    sys.settrace(tracer)
