"""What every kind of host can do with a job, and the log that is read on after a lost connection."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from wmtp_worker.errors import EXIT_CODES, HostError
from wmtp_worker.launch.request import Request
from wmtp_worker.launch.shell import Shell

Write = Callable[[bytes], None]
BEFORE = 1 << 14  # bytes of a log that are shown before what is new
_PATIENCE = 900  # seconds for which a lost connection is tried again
_LONGEST_PAUSE = 30


@dataclass(frozen=True)
class State:
    """How a job is: `phase` in a word; `exit_code` once it ended, where the host still knows it."""

    phase: str
    exit_code: int | None = None
    detail: str = ""

    @property
    def alive(self) -> bool:
        return self.phase in ("starting", "running", "stopping")

    def __str__(self) -> str:
        code = "" if self.exit_code is None else f" with {self.exit_code}: {meaning(self.exit_code)}"
        return f"{self.phase}{code}" + (f" ({self.detail})" if self.detail else "")


def meaning(code: int) -> str:
    """An exit code in words."""
    if code in EXIT_CODES:
        return EXIT_CODES[code]
    return f"killed by signal {code - 128}" if 128 < code < 128 + 65 else "not one of the worker's"


class Host(Protocol):
    """One job's place on one kind of host."""

    def preview(self, request: Request) -> str:
        """Exactly what would be sent, with `***` for secrets."""
        ...

    def start(self, request: Request) -> Mapping[str, str]:
        """Start it, detached; what has to be remembered to find it again.

        Raises `RunHeldError` where a job of this name runs already.
        """
        ...

    def find(self) -> Mapping[str, str] | None:
        """What `start` returns, of a job of this name that is there already; None where there is none."""
        ...

    def state(self) -> State: ...

    def logs(self, write: Write, follow: bool) -> None:
        """Hand on the end of the log, and with `follow` what comes, until the job ends."""
        ...

    def stop(self, grace: float) -> State:
        """Ask it to save and end, wait for at most `grace` seconds, and say how it is then."""
        ...


@runtime_checkable
class Rented(Protocol):
    """A place on a machine that was rented for the job, and whose disk outlives a stop."""

    def give_back(self) -> State:
        """Delete the machine and its disk, with whatever is on that alone."""
        ...


def read_on(
    shell: Shell,
    size: list[str],
    read: Callable[[int], list[str]],
    write: Write,
    follow: bool,
    pause: Callable[[float], None] = time.sleep,
) -> None:
    """Hand on a log from `BEFORE` bytes before its end: each byte once, however often the connection is lost.

    `size` is the command that prints its length, `read(offset)` the one that prints what comes after so many bytes.
    """
    done = shell.run(size)
    words = done.out.split()
    if done.code != 0 or not words:
        raise HostError("there is no log", where=shell.where, fix=done.err.strip() or "`wmtp launch status` knows more")
    offset = max(0, int(words[0]) - BEFORE)
    lost_since: float | None = None
    wait = 1.0

    def hand_on(data: bytes) -> None:
        nonlocal offset, lost_since, wait
        write(data)
        offset, lost_since, wait = offset + len(data), None, 1.0

    while True:
        try:
            shell.stream(read(offset), hand_on)
            return
        except HostError:
            now = time.monotonic()
            lost_since = now if lost_since is None else lost_since
            if not follow or now - lost_since > _PATIENCE:
                raise
            pause(wait)
            wait = min(wait * 2, _LONGEST_PAUSE)
