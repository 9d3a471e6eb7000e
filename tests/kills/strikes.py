"""One signal at one line: where in the worker's own code, in whichever thread, a process is struck."""

import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import wmtp_worker

PACKAGE = Path(wmtp_worker.__file__).parent
# the parts of a save, and the rest of a run, by the files (or the folder) whose lines they run
PHASES: Mapping[str, tuple[str, ...]] = {
    "copy": ("checkpoint/staging.py", "checkpoint/saver.py", "checkpoint/snapshot.py"),
    "write": ("checkpoint/store.py", "checkpoint/tensorfile.py", "checkpoint/manifest.py"),
    "shared": ("checkpoint/shared.py",),
    "settle": ("storage/atomic.py", "training/saving.py", "checkpoint/ledger.py"),
    "upload": ("storage/transfer",),
    "publish": ("storage/publish.py", "storage/published.py", "storage/sealed.py", "storage/runs.py"),
    "retain": ("storage/retention.py",),
    "lease": ("storage/lease.py", "storage/lease_file.py"),
    "anywhere": ("",),
}


@dataclass(frozen=True)
class Strike:
    """Send `number` to this process when the `line`-th line of a phase is about to run; say so in `mark` before."""

    phase: str
    line: int
    number: signal.Signals
    mark: Path

    @property
    def happened(self) -> bool:
        return self.mark.exists()

    def __str__(self) -> str:
        where = self.mark.read_text() if self.happened else f"line {self.line} of {self.phase}, not reached"
        return f"{self.number.name} at {where}"


class _Tracer:
    """Counts the lines of each phase in all threads, until `reached` (phase, number and place of a line) is true."""

    def __init__(self, phases: Mapping[str, tuple[str, ...]], reached: Callable[[str, int, str], bool]) -> None:
        self.lines: Counter[str] = Counter()
        self._prefixes = {phase: tuple(str(PACKAGE / name) for name in names) for phase, names in phases.items()}
        self._phases: dict[str, list[str]] = {}  # by file
        self._reached = reached
        self._over = False
        self._lock = threading.Lock()

    def start(self) -> None:
        """Trace this thread, and those that begin later."""
        threading.settrace(self)
        sys.settrace(self)

    def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
        return self._on_line if not self._over and self._of(frame.f_code.co_filename) else None

    def _of(self, file: str) -> list[str]:
        if (found := self._phases.get(file)) is None:
            found = [phase for phase, prefixes in self._prefixes.items() if file.startswith(prefixes)]
            self._phases[file] = found
        return found

    def _on_line(self, frame: FrameType, event: str, argument: object) -> Any:
        if self._over:
            return None
        if event == "line":
            for phase in self._of(frame.f_code.co_filename):
                with self._lock:
                    self.lines[phase] += 1
                    number = self.lines[phase]
                if self._reached(phase, number, f"{frame.f_code.co_filename}:{frame.f_lineno}"):
                    self._over = True
        return self._on_line


def arm(strike: Strike) -> None:
    """Let this process strike itself."""

    def reached(phase: str, line: int, place: str) -> bool:
        if line != strike.line:
            return False
        strike.mark.write_text(place.removeprefix(f"{PACKAGE}/"))
        os.kill(os.getpid(), strike.number)
        return True

    _Tracer({strike.phase: PHASES[strike.phase]}, reached).start()


def count() -> Counter[str]:
    """The lines of every phase that this process runs from now on: they are added while it does."""
    tracer = _Tracer(PHASES, lambda phase, line, place: False)
    tracer.start()
    return tracer.lines
