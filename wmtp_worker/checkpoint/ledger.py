"""`ledger.jsonl`: what each process of a run did and how it ended, one JSON object a line, appended for ever.

    start    a process begins: where, on how many GPUs, and how far the one before it was seen to have come
    running  its first step is done: what it went on from, and how long each phase until then took
    save     a checkpoint was taken: what that cost
    end      it ends by itself; a process without such a line was killed

The ledger lies with the logs and travels with them to the bucket and back. It never stops a training: what cannot be
written is warned of once. `losses.summarise` makes the account of what was lost from it::

    phases = Phases()                                       # first of all
    before = read_heartbeat(paths.heartbeat)                # before the first beat of this process
    …fetch…
    ledger = Ledger.begin(paths.ledger, paths.metrics, phases, heartbeats=[before, the_bucket's], …)
    …set up, restore, first step…
    ledger.running(resumed_from)
    ledger.save(step, pause=…)                              # each save
    ledger.end("finished", step)                            # before the last publish of the logs
"""

import errno
import json
import logging
import os
import secrets
import socket
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

log = logging.getLogger(__name__)

# the limits keep sums finite and dates printable, whatever a file says
Count = Annotated[int, Field(ge=0, le=10**15)]
Seconds = Annotated[float, Field(ge=0, le=1e12)]
Time = Annotated[float, Field(ge=0, le=2.5e11)]
How = Literal["finished", "notice", "failed"]
_TAIL = 1 << 18  # bytes of metrics.jsonl that are looked at
_LATEST = 100  # steps whose mean time counts


class _Line(BaseModel):
    # a newer worker may write more
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    process: str = Field(description="random, one for each process")
    time: Time = Field(description="seconds since the epoch")


class Reached(BaseModel):
    """How far the process before was seen to have come: the last it said, wherever that was found."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    step: Count = 0
    time: Time | None = None
    seconds_per_step: Seconds | None = None


class Start(_Line):
    event: Literal["start"] = "start"
    host: str
    pid: int
    gpus: Annotated[int, Field(ge=1, le=10**6)] = Field(description="1 for a machine without")
    price_per_hour: Seconds | None = Field(default=None, description="of the machine, not of a GPU")
    resume: Literal["auto", "never"] | Count = "auto"
    reached: Reached = Reached()
    phases: dict[str, Seconds] = Field(default={}, description="those done so far, in seconds")


class Running(_Line):
    event: Literal["running"] = "running"
    resumed_from: Count | None = None
    phases: dict[str, Seconds] = Field(default={}, description="all until the first step was done, in seconds")


class Save(_Line):
    event: Literal["save"] = "save"
    step: Count
    pause: Seconds = Field(description="the loop stood still")
    cost: Seconds | None = Field(default=None, description="of training: pause and slower steps, as lately measured")
    carry: Seconds | None = Field(default=None, description="from snapshot to published, as lately measured")
    seconds_per_step: Seconds | None = None
    kind: str = "full"


class End(_Line):
    event: Literal["end"] = "end"
    how: How
    step: Count
    seconds_per_step: Seconds | None = None
    detail: str = ""


Event = Start | Running | Save | End
_EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="event")])


def read_ledger(path: Path) -> list[Event]:
    """Every line of a ledger that can be understood, in order; a torn one is left out, an absent file is empty."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    events = []
    for line in lines:
        try:
            events.append(_EVENT.validate_json(line))
        except ValidationError:
            if line:
                log.debug("a line of %s is left out", path)
    return events


def read_heartbeat(path: Path) -> dict[str, Any] | None:
    """The last `heartbeat.json` of the process before; None where there is none, or none that can be read."""
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


class Phases:
    """How long the parts of a start take, in seconds by name; the first one began with the process itself."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter() - process_age()

    def done(self, name: str) -> None:
        """The phase called `name` (boot, fetch, setup, restore, first_step) ends here."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


def process_age() -> float:
    """Seconds since this process began, imports and all; 0 where the system does not tell."""
    try:
        # field 22 of proc(5), in ticks since the machine was booted; the name before it may hold spaces
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0


def newest_end(events: Sequence[Event]) -> End | None:
    """How the newest process ended, whatever it saved after that; None while it has not, or where it was killed."""
    newest = next((event for event in reversed(events) if isinstance(event, Start | End)), None)
    return newest if isinstance(newest, End) else None


class Ledger:
    """The ledger of a run, and this process's lines in it. Only the holder of the run's lock may have one."""

    def __init__(self, path: Path | None = None, events: Sequence[Event] = (), process: str = "") -> None:
        """Without a path nothing is written: what the ranks have that are not the first."""
        self.events = list(events)
        self._path = path
        self._process = process
        self.phases = Phases()
        self._failed = False
        self._ended = False

    @classmethod
    def begin(
        cls,
        path: Path,
        metrics: Path,
        phases: Phases,
        *,
        gpus: int,
        price_per_hour: float | None = None,
        resume: Literal["auto", "never"] | int = "auto",
        heartbeats: Iterable[Mapping[str, Any] | None] = (),
    ) -> Self:
        """Write the start of this process, and how far the one before had come.

        Call it when the logs have come from the bucket, and before `metrics` is cut back to the checkpoint.
        `heartbeats` are the `heartbeat.json` of the work directory and of the bucket as they were before this process
        wrote them: after a wiped disk the bucket's knows of later steps than the metrics published with the last save.
        """
        ledger = cls(path, read_ledger(path), secrets.token_hex(4))
        ledger.phases = phases
        start = Start(
            process=ledger._process,
            time=time.time(),
            host=socket.gethostname(),
            pid=os.getpid(),
            gpus=max(1, gpus),
            price_per_hour=price_per_hour,
            resume=resume,
            reached=_reached(ledger.events, metrics, heartbeats),
            phases=dict(phases.seconds),
        )
        ledger._append(start)
        return ledger

    def running(self, resumed_from: int | None) -> None:
        """The first step is done: call it once, with the step of the checkpoint this process went on from."""
        phases = dict(self.phases.seconds)
        self._append(Running(process=self._process, time=time.time(), resumed_from=resumed_from, phases=phases))

    def save(
        self,
        step: int,
        pause: float,
        cost: float | None = None,
        carry: float | None = None,
        seconds_per_step: float | None = None,
        kind: str = "full",
    ) -> None:
        """A checkpoint was taken after `step`; the last three numbers are `IntervalPolicy`'s. All in seconds."""
        line = Save(
            process=self._process,
            time=time.time(),
            step=step,
            pause=pause,
            cost=cost,
            carry=carry,
            seconds_per_step=seconds_per_step,
            kind=kind,
        )
        self._append(line)

    def end(self, how: How, step: int, seconds_per_step: float | None = None, detail: str = "") -> None:
        """This process ends by itself after `step`: `notice` when it was asked to, `failed` with an error.

        The first call counts: what goes wrong after it does not make another end of it. Call it before the logs are
        published for the last time: what comes later, the bucket does not learn.
        """
        if self._ended:
            return
        self._ended = True
        line = End(
            process=self._process,
            time=time.time(),
            how=how,
            step=step,
            seconds_per_step=seconds_per_step,
            detail=detail,
        )
        self._append(line)

    @property
    def ended(self) -> How | None:
        """How this process ended; None while it has not."""
        end = newest_end(self.events) if self._ended else None
        return end.how if end else None

    def _append(self, event: Event) -> None:
        """One write to the end of the file: a line is there whole, or torn at the very end by a crash."""
        self.events.append(event)
        if self._path is None:
            return
        line = (event.model_dump_json(exclude_none=True) + "\n").encode()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                size = os.fstat(descriptor).st_size
                if size and os.pread(descriptor, 1, size - 1) != b"\n":
                    line = b"\n" + line  # after one that was torn
                if os.write(descriptor, line) < len(line):  # what does not fit any more is left out without a word
                    os.ftruncate(descriptor, size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(descriptor)
        except OSError as error:
            if not self._failed:
                log.warning("the ledger of lost work cannot be written: %s: %s", self._path, error.strerror)
            self._failed = True


def _reached(events: list[Event], metrics: Path, heartbeats: Iterable[Mapping[str, Any] | None]) -> Reached:
    began = max((event.time for event in events if isinstance(event, Start)), default=0.0)
    steps, times = [0], []
    for heartbeat in heartbeats:
        step, when = (heartbeat or {}).get("step"), (heartbeat or {}).get("time")
        # an older one is of a process whose loss is in the ledger already
        if isinstance(when, int | float) and when >= began:
            times.append(float(when))
            if isinstance(step, int) and step >= 0:
                steps.append(step)
    seconds = []
    for record in _last_records(metrics):
        if record.get("kind") == "train" and isinstance(step := record.get("step"), int) and step >= 0:
            steps.append(step)
            if isinstance(took := record.get("seconds"), int | float) and took >= 0:
                seconds.append(float(took))
    latest = seconds[-_LATEST:]
    try:
        return Reached(
            step=max(steps),
            time=max(times, default=None),
            seconds_per_step=statistics.fmean(latest) if latest else None,
        )
    except ValidationError:  # not a number, from a file that somebody else wrote
        return Reached()


def _last_records(metrics: Path) -> list[dict[str, Any]]:
    """The last records of a metrics file that can be read, in order."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
            lines = file.read().splitlines()
    except OSError:
        return []
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue  # the first may be the end of one, the last one torn
        if isinstance(record, dict):
            records.append(record)
    return records
