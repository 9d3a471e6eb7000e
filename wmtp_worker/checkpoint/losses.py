"""What interruptions cost a run: steps, GPU seconds and money, from its ledger."""

import itertools
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from wmtp_worker.checkpoint.interval import DAY, History, spell
from wmtp_worker.checkpoint.ledger import End, Event, Running, Save, Start

FIRST_STEP = "first_step"


@dataclass(frozen=True)
class Interruption:
    """One process that ended before the run did, and what going on took. Seconds are of the machine, not of a GPU."""

    time: float  # when the process that went on began, seconds since the epoch
    host: str  # of that process
    how: str  # notice, failed, killed
    reached: int  # the last step that was seen
    resumed_from: int | None  # None: from the beginning; also while nothing goes on yet
    steps: int  # done again
    work_seconds: float  # those steps once more
    restart: dict[str, float]  # seconds by phase
    away: float | None  # seconds from the last sign of life to the next start: nobody worked, perhaps nobody paid
    gpu_seconds: float
    money: float | None

    @property
    def restart_seconds(self) -> float:
        return sum(self.restart.values())

    @property
    def unannounced(self) -> bool:
        """Whether a shorter interval between saves would have helped."""
        return self.steps > 0 or self.how == "killed"


@dataclass(frozen=True)
class Losses:
    """The account of a run. GPU seconds are machine seconds times the GPUs of that machine."""

    interruptions: list[Interruption] = field(default_factory=list)
    processes: int = 0
    days: float = 0.0  # of running, all processes together
    saves: int = 0
    pause_seconds: float = 0.0  # of the machine
    work_gpu_seconds: float = 0.0
    restart_gpu_seconds: float = 0.0
    save_gpu_seconds: float = 0.0
    money: float | None = None  # of all three; None where no price is known
    cost: float | None = None  # of all the running, each process at its own price; None where no price is known
    unpriced: int = 0  # processes that the cost leaves out
    history: History = field(default_factory=History)  # for the interval between saves

    @property
    def steps(self) -> int:
        return sum(item.steps for item in self.interruptions)

    @property
    def gpu_seconds(self) -> float:
        return self.work_gpu_seconds + self.restart_gpu_seconds + self.save_gpu_seconds

    @property
    def per_day(self) -> float | None:
        """Interruptions observed in a day of running; None before anything ran."""
        return len(self.interruptions) / self.days if self.days else None

    def to_json(self) -> dict[str, Any]:
        totals = {
            "interruptions": [asdict(item) for item in self.interruptions],
            "processes": self.processes,
            "days": self.days,
            "interruptions_per_day": self.per_day,
            "steps": self.steps,
        }
        return totals | self._sums() | {"money": self.money}

    def metrics(self) -> dict[str, float]:
        """The totals as numbers by name, for tracking."""
        counts = {"interruptions": float(len(self.interruptions)), "steps": float(self.steps)}
        money = {} if self.money is None else {"money": self.money}
        return {f"losses/{name}": value for name, value in (counts | self._sums() | money).items()}

    def _sums(self) -> dict[str, float]:
        return {
            "saves": float(self.saves),
            "pause_seconds": self.pause_seconds,
            "work_gpu_seconds": self.work_gpu_seconds,
            "restart_gpu_seconds": self.restart_gpu_seconds,
            "save_gpu_seconds": self.save_gpu_seconds,
            "gpu_seconds": self.gpu_seconds,
        }

    def sentence(self) -> str:
        """One line for the end of a run."""
        price = "" if self.money is None else f", {self.money:,.2f} in money"
        return (
            f"{_counted(len(self.interruptions), 'interruption')} in {spell(self.days * DAY)} of running, "
            f"{_counted(self.steps, 'step')} done again; lost GPU time: {spell(self.gpu_seconds)} "
            f"({spell(self.work_gpu_seconds)} of work, {spell(self.restart_gpu_seconds)} in restarts, "
            f"{spell(self.save_gpu_seconds)} in {_counted(self.saves, 'save')}){price}"
        )


def _counted(number: int, thing: str) -> str:
    return f"{number or 'no'} {thing}{'' if number == 1 else 's'}"


@dataclass
class _Process:
    """The lines of one process, and what the next one knew of it."""

    start: Start
    running: Running | None = None
    saves: list[Save] = field(default_factory=list)
    end: End | None = None
    reached: int = 0
    last: float = 0.0
    seconds_per_step: float | None = None

    def add(self, event: Running | Save | End) -> None:
        self.last = max(self.last, event.time)
        if isinstance(event, Running):
            self.running = event
            self.reached = max(self.reached, event.resumed_from or 0)
            return
        self.reached = max(self.reached, event.step)
        self.seconds_per_step = event.seconds_per_step or self.seconds_per_step
        if isinstance(event, Save):
            self.saves.append(event)
        else:
            self.end = event

    def seen_by(self, after: Start) -> None:
        """What the process `after` it found when it began."""
        self.reached = max(self.reached, after.reached.step)
        self.seconds_per_step = self.seconds_per_step or after.reached.seconds_per_step
        if self.end is None and after.reached.time is not None:
            self.last = max(self.last, after.reached.time)

    @property
    def seconds(self) -> float:
        """It ran for so long, as far as is known, from before its start was written."""
        return max(0.0, self.last - self.start.time) + sum(self.start.phases.values())

    @property
    def restart(self) -> dict[str, float]:
        """Seconds by phase until it was where an undisturbed run would have been."""
        if self.running is None:  # ended before it got anywhere
            rest = self.seconds - sum(self.start.phases.values())
            return self.start.phases | {"unfinished": rest}
        phases = dict(self.running.phases)
        if FIRST_STEP in phases:  # the step itself is work
            phases[FIRST_STEP] = max(0.0, phases[FIRST_STEP] - (self.seconds_per_step or 0.0))
        return phases


def summarise(events: Iterable[Event], now: float | None = None) -> Losses:
    """The account of a run from the lines of its ledger; `now` (seconds since the epoch) if the last process runs.

    Lost are the steps from the checkpoint gone on from to the last one seen, times the seconds of a step, and the
    restart until the first step. A start that was told where to begin (`--resume never`, or a step) is a decision of
    somebody, and one after a finished run is no interruption.
    """
    processes = _processes(events)
    if processes and now is not None and processes[-1].end is None:
        processes[-1].last = max(processes[-1].last, now)
    interruptions = []
    work = restarts = 0.0
    lost_by = None  # the process whose steps the next one that runs will do again
    for before, after in itertools.pairwise(processes):
        if before.running is not None or lost_by is None:
            lost_by = before
        else:
            lost_by.reached = max(lost_by.reached, before.reached)
        if after.start.resume != "auto" or (before.end is not None and before.end.how == "finished"):
            continue
        item = _interruption(before, after, lost_by)
        interruptions.append(item)
        work += item.work_seconds * lost_by.start.gpus
        restarts += item.restart_seconds * after.start.gpus
    pauses = [(sum(save.pause for save in process.saves), process.start) for process in processes]
    money = [_money(pauses), *(item.money for item in interruptions)]
    known = [amount for amount in money if amount is not None]
    return Losses(
        interruptions=interruptions,
        processes=len(processes),
        days=sum(process.seconds for process in processes) / DAY,
        saves=sum(len(process.saves) for process in processes),
        pause_seconds=sum(pause for pause, _ in pauses),
        work_gpu_seconds=work,
        restart_gpu_seconds=restarts,
        save_gpu_seconds=sum(pause * start.gpus for pause, start in pauses),
        money=sum(known) if known else None,
        cost=_money([(process.seconds, process.start) for process in processes]),
        unpriced=sum(process.start.price_per_hour is None for process in processes),
        history=_history(processes, interruptions),
    )


def _processes(events: Iterable[Event]) -> list[_Process]:
    found: dict[str, _Process] = {}
    latest = None
    for event in events:
        if isinstance(event, Start):
            if latest is not None:
                latest.seen_by(event)
            latest = found[event.process] = _Process(event, last=event.time)
        elif event.process in found:
            found[event.process].add(event)
    return list(found.values())


def _interruption(before: _Process, after: _Process, lost_by: _Process) -> Interruption:
    resumed_from = after.running.resumed_from if after.running else None
    # as long as nothing has gone on, it is not known from where
    steps = max(0, lost_by.reached - (resumed_from or 0)) if after.running else 0
    work = steps * (lost_by.seconds_per_step or 0.0)
    restart = after.restart
    seconds = sum(restart.values())
    return Interruption(
        time=after.start.time,
        host=after.start.host,
        how=before.end.how if before.end else "killed",
        reached=lost_by.reached,
        resumed_from=resumed_from,
        steps=steps,
        work_seconds=work,
        restart=restart,
        away=max(0.0, after.start.time - sum(after.start.phases.values()) - before.last),
        gpu_seconds=work * lost_by.start.gpus + seconds * after.start.gpus,
        money=_money([(work, lost_by.start), (seconds, after.start)]),
    )


def _money(parts: list[tuple[float, Start]]) -> float | None:
    """What so many seconds of these machines cost, as far as their prices are known; None where none is."""
    prices = [seconds * start.price_per_hour / 3600 for seconds, start in parts if start.price_per_hour is not None]
    return sum(prices) if prices else None


def _history(processes: list[_Process], interruptions: list[Interruption]) -> History:
    saves = [save for process in processes for save in process.saves]
    return History(
        unannounced=sum(item.unannounced for item in interruptions),
        days=sum(process.seconds for process in processes) / DAY,
        cost=next((save.cost for save in reversed(saves) if save.cost is not None), None),
        carry=next((save.carry for save in reversed(saves) if save.carry is not None), None),
    )
