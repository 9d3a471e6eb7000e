"""What a check is, and how checks are made: one after the other, each within its time, none able to hide the others."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from wmtp_worker.errors import WorkerError
from wmtp_worker.redact import redact

Status = Literal["pass", "warn", "fail"]
_TICK = 0.05  # seconds between two looks at whether somebody wants us to stop


@dataclass(frozen=True)
class Check:
    """What one check found, and what to do about it unless it passed. Texts are without secrets."""

    name: str
    status: Status
    found: str
    advice: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Probe:
    """A check to be made. `look` gives None where there is nothing to say, and may raise anything.

    `seconds` is the time it gets; `late` what it means that it took longer. `quick`: whether it needs neither torch nor
    a server further away than the metadata service.
    """

    name: str
    look: Callable[[], Check | None]
    seconds: float = 10.0
    late: Status = "warn"
    quick: bool = True


def examine(probes: Iterable[Probe], poll: Callable[[], None] = lambda: None) -> Iterator[Check]:
    """Make each check when it is asked for. `poll` is called many times a second and may raise to stop.

    A check that raises has failed, if that is an error of ours, else it is a warning; one that does not answer in time
    is left alone, in a thread that does not keep the process from ending.
    """
    for probe in probes:
        began = time.monotonic()
        found = _within(probe, poll)
        if found is not None:
            seconds = round(time.monotonic() - began, 3)
            yield replace(found, found=redact(found.found), advice=redact(found.advice), seconds=seconds)


def _within(probe: Probe, poll: Callable[[], None]) -> Check | None:
    answers: list[Check | None] = []
    thread = threading.Thread(target=lambda: answers.append(_look(probe)), name=f"doctor: {probe.name}", daemon=True)
    thread.start()
    ends = time.monotonic() + probe.seconds
    while thread.is_alive() and time.monotonic() < ends:
        poll()
        thread.join(_TICK)
    poll()
    if answers:
        return answers[0]
    advice = "what it looks at hangs, or is very slow: try again, or take another machine"
    return Check(probe.name, probe.late, f"no answer within {probe.seconds:g} s", advice)


def _look(probe: Probe) -> Check | None:
    try:
        return probe.look()
    except WorkerError as error:
        return failed(probe.name, error)
    except Exception as error:  # whatever a driver or a library raises
        words = " ".join(str(error).split())[:300]
        return Check(probe.name, "warn", f"could not be looked at: {type(error).__name__}: {words}", "look by hand")


def failed(name: str, error: WorkerError, status: Status = "fail") -> Check:
    """The check of an error that says what to do."""
    where = f" (from {error.where})" if error.where else ""
    return Check(name, status, f"{error.what}{where}", error.fix or "")
