"""A request to stop, from a signal, that everything long-running polls.

Standard library only and imported first of all: a signal that arrives while torch is being imported must not
be lost.
"""

import contextlib
import os
import signal
from types import FrameType
from typing import Self

from wmtp_worker.errors import Interrupted

# SIGHUP is a dropped ssh session
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_NOHUP = (signal.SIGHUP, signal.SIG_IGN)


class StopRequest:
    """The first signal asks for a stop at the next safe moment, the second ends the process at once.

    The second one exits with 128 + its number, as a shell would report it, and runs no clean-up. `install`
    must be called from the main thread; polling is safe from any.
    """

    def __init__(self) -> None:
        self._reason: str | None = None
        self._before: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        """Whether somebody asked for a stop."""
        return self._reason is not None

    @property
    def reason(self) -> str | None:
        """Who asked first: a signal's name, or what `request` was given."""
        return self._reason

    def request(self, reason: str) -> None:
        """Ask for a stop without a signal; the first reason is kept."""
        self._reason = self._reason or reason

    def check(self) -> None:
        """Raise `Interrupted` if a stop was asked for."""
        if self._reason is not None:
            raise Interrupted(f"stopped by {self._reason}", fix="the same command goes on from what is saved")

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
        self._reason = None

    def __enter__(self) -> Self:
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        self.uninstall()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._reason is not None:
            os._exit(128 + number)
        name = signal.Signals(number).name
        self._reason = name
        _say(f"wmtp: {name}: stopping at the next safe moment; a second signal stops at once\n")


def _say(line: str) -> None:
    # print could be interrupted inside its own lock; a closed stderr must not end a run that is about to save
    with contextlib.suppress(OSError):
        os.write(2, line.encode())


STOP = StopRequest()
