"""A request to stop, from a signal or a notice, that everything long-running polls.

Standard library only and imported first of all: a signal that arrives while torch is being imported must not
be lost.
"""

import contextlib
import math
import os
import signal
import time
from types import FrameType
from typing import NamedTuple, Self

from wmtp_worker.errors import Interrupted

# SIGHUP is a dropped ssh session
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_NOHUP = (signal.SIGHUP, signal.SIG_IGN)
# seconds that the host leaves between SIGTERM and SIGKILL: docker 10, Kubernetes 30, unless told otherwise
GRACE = "WMTP_STOP_GRACE_SECONDS"


class _Request(NamedTuple):
    reason: str
    deadline: float | None
    machine_goes: bool


class StopRequest:
    """The first signal asks for a stop at the next safe moment, the second ends the process at once.

    The second one exits with 128 + its number, as a shell would report it, and runs no clean-up. `install`
    must be called from the main thread; polling and requesting are safe from any.
    """

    def __init__(self) -> None:
        # only ever appended to, which needs no lock: a handler that took one could wait for the code it interrupts
        self._requests: list[_Request] = []
        self._warnings: list[str] = []
        self._signalled = False
        self._before: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        """Whether somebody asked for a stop."""
        return bool(self._requests)

    @property
    def reason(self) -> str | None:
        """Who asked first: a signal's name, or what `request` was given."""
        return self._requests[0].reason if self._requests else None

    @property
    def deadline(self) -> float | None:
        """The earliest moment, on `time.monotonic`'s clock, at which the process may be ended; None: not known."""
        return min((one.deadline for one in self._requests if one.deadline is not None), default=None)

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the deadline, never less than 0; None where nobody set one."""
        return None if (deadline := self.deadline) is None else max(0.0, deadline - time.monotonic())

    @property
    def machine_goes(self) -> bool:
        """Whether a notice said that the machine goes, perhaps with its disk: then only the bucket keeps things."""
        return any(one.machine_goes for one in self._requests)

    def request(self, reason: str, deadline: float | None = None, *, machine_goes: bool = False) -> None:
        """Ask for a stop without a signal; the first reason and the earliest deadline are kept."""
        self._requests.append(_Request(reason, deadline, machine_goes))

    def warn(self, reason: str) -> None:
        """Ask for a save soon, and no stop."""
        self._warnings.append(reason)

    @property
    def save_soon(self) -> bool:
        """Whether somebody asked for a save since the last `take_save`."""
        return bool(self._warnings)

    def take_save(self) -> str | None:
        """Who asked for a save first since the last time, and forget it; None if nobody did."""
        reason = None
        while self._warnings:
            reason = self._warnings.pop()
        return reason

    def check(self) -> None:
        """Raise `Interrupted` if a stop was asked for."""
        if self._requests:
            raise Interrupted(f"stopped by {self.reason}", fix="the same command goes on from what is saved")

    def install(self) -> None:
        """Take over SIGTERM, SIGINT and SIGHUP; a second call changes nothing.

        A SIGHUP that is ignored already stays so: that is what `nohup` is for.
        """
        if not self._before:
            wanted = [number for number in SIGNALS if (number, signal.getsignal(number)) != _NOHUP]
            self._before = {number: signal.signal(number, self._on_signal) for number in wanted}

    def uninstall(self) -> None:
        """Give the signals back to whoever had them and forget any request."""
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}
        self._requests, self._warnings, self._signalled = [], [], False

    def __enter__(self) -> Self:
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        self.uninstall()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # after a notice, the SIGTERM of the machine's shutdown is the first signal, and must not cut off the save
        if self._signalled:
            if number == signal.SIGHUP:  # a terminal that hangs up may say so twice: nobody insists
                return
            os._exit(128 + number)
        self._signalled = True
        name = signal.Signals(number).name
        self.request(name, _deadline_of(number))
        _say(f"wmtp: {name}: stopping at the next safe moment; a second signal stops at once\n")


def _deadline_of(number: int) -> float | None:
    """When SIGKILL follows a SIGTERM, by $WMTP_STOP_GRACE_SECONDS; a person's Ctrl-C has no deadline."""
    if number != signal.SIGTERM:
        return None
    with contextlib.suppress(KeyError, ValueError):
        grace = float(os.environ[GRACE])
        return time.monotonic() + grace if math.isfinite(grace) and grace >= 0 else None
    return None


def _say(line: str) -> None:
    # print could be interrupted inside its own lock; a closed stderr must not end a run that is about to save
    with contextlib.suppress(OSError):
        os.write(2, line.encode())


STOP = StopRequest()
