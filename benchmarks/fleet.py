"""30 days of 8xH100 training of a 7B model that is interrupted again and again: GPU time wasted, by save policy.

The decisions are the worker's own: `IntervalPolicy` says when to save, `emergency.choose` what to do at a notice. What
is simulated is the rest: steps, the pipeline behind a save, and machines that are taken away with their disks. The
replacement is there at once, so only time that is paid for counts. Rates default to those measured for one process in
results/{saving,transfer}.json, times the ranks: each rank writes and sends its own shard.

    python benchmarks/fleet.py                 # results/fleet.json and fleet.png
    python benchmarks/fleet.py --upload 5 --price 20
"""

import argparse
import json
import math
import random
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from wmtp_worker.checkpoint.emergency import choose
from wmtp_worker.checkpoint.interval import DAY, History, IntervalPolicy, spell

HOUR = 3600.0
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Machine:
    """What the run and its machine are like. Seconds, bytes, bytes per second."""

    gpus: int = 8
    price: float = 24.0  # an hour, of the machine
    step: float = 7.0  # 0.5 M tokens of a 7B model at 40 % of the peak of eight H100
    state: float = 84e9  # weights and Adam's two moments, fp32
    trainable: float = 28e9  # the weights alone
    torch_save: float = 5e9
    write: float = 4e9
    upload: float = 0.4e9
    download: float = 1.1e9
    pause: float = 0.05  # of a background save
    slowdown: float = 0.05  # of steps while a checkpoint is written and sent
    boot: float = 150.0  # image, imports, process groups, first step, without the download

    @property
    def restart(self) -> float:
        return self.boot + self.state / self.download


@dataclass(frozen=True)
class Policy:
    """How to save: blocking or behind the training, every so many seconds, with or without heeding notices."""

    name: str
    background: bool
    every: float | Literal["auto"]
    notice: float = 0.0  # seconds

    def pause(self, machine: Machine) -> float:
        return machine.pause if self.background else machine.state / machine.torch_save

    def carry(self, machine: Machine) -> float:
        """Seconds behind the training until the checkpoint is safe from the loss of the machine."""
        return (machine.state / machine.write if self.background else 0.0) + machine.state / machine.upload

    def interval(self, machine: Machine, history: History) -> IntervalPolicy:
        every = self.every if self.every == "auto" else max(1, round(self.every / machine.step))
        return IntervalPolicy(every, history=history)


POLICIES = (
    Policy("torch.save, blocking, every hour", False, HOUR),
    Policy("torch.save, blocking, every 10 min", False, 600.0),
    Policy("background, every 10 min", True, 600.0),
    Policy("background, auto", True, "auto"),
    Policy("auto, notice of 30 s heeded (GCP)", True, "auto", 30.0),
    Policy("auto, notice of 2 min heeded (EC2)", True, "auto", 120.0),
)


# --- interruptions -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interruption:
    at: float  # seconds since the beginning
    announced: bool


def poisson(per_day: float, days: float, rng: random.Random) -> Iterator[float]:
    """Interruptions that know nothing of each other."""
    at = 0.0
    while per_day and (at := at + rng.expovariate(per_day / DAY)) < days * DAY:
        yield at


def bursts(per_day: float, days: float, rng: random.Random, size: int = 4) -> Iterator[float]:
    """As many, but in bursts of `size`, 20 minutes apart: a region runs out of machines."""
    for first in poisson(per_day / size, days, rng):
        at = first
        for _ in range(size):
            if at < days * DAY:
                yield at
            at += rng.expovariate(1 / 1200)


def diurnal(per_day: float, days: float, rng: random.Random) -> Iterator[float]:
    """As many, nearly all in working hours, when others want the machines."""
    for at in poisson(2 * per_day, days, rng):  # thinned
        if rng.random() < (1 - 0.9 * math.cos(2 * math.pi * at / DAY)) / 2:
            yield at


TRACES = {"Poisson": poisson, "bursts": bursts, "diurnal": diurnal}


def trace(kind: str, per_day: float, days: float, seed: int, announced: float) -> list[Interruption]:
    """A reproducible trace; the share `announced` of it comes with a notice."""
    rng = random.Random(f"{kind} {per_day} {seed}")
    return [Interruption(at, rng.random() < announced) for at in sorted(TRACES[kind](per_day, days, rng))]


# --- one run -----------------------------------------------------------------------------------------------------


@dataclass
class Waste:
    """Seconds of the machine that did not bring the training forward, and those that did."""

    paused: float = 0.0
    slowed: float = 0.0
    lost: float = 0.0
    restarted: float = 0.0
    useful: float = 0.0
    saves: int = 0

    @property
    def wasted(self) -> float:
        return self.paused + self.slowed + self.lost + self.restarted

    @property
    def share(self) -> float:
        return self.wasted / (self.wasted + self.useful)


@dataclass
class Process:
    """One process of the run, from the step it resumed at until its machine goes."""

    machine: Machine
    policy: Policy
    history: History
    durable: float  # the last step that is safe
    now: float
    waste: Waste
    flying: tuple[float, float, float] | None = None  # when it is through, when it began, its step
    waiting: tuple[float, float] | None = None  # when it began, its step
    interval: IntervalPolicy = field(init=False)

    def __post_init__(self) -> None:
        self.step = self.last_saved = self.durable
        self.interval = self.policy.interval(self.machine, self.history)

    def run(self, until: float) -> None:
        """Train and save."""
        while self.now < until:
            following = self.interval.next_save(round(self.last_saved))
            self._train(1.0 if following is None else following - self.step, until)
            if following is not None and self.now < until:
                self._save(until)

    def _train(self, steps: float, until: float) -> None:
        """Take so many steps, as far as time allows; a checkpoint on its way makes them slower."""
        usual = self.machine.step
        while steps > 1e-9 and self.now < until:
            through = self.flying[0] if self.flying else math.inf
            each = usual * (1 + self.machine.slowdown) if self.flying else usual
            done = min(steps, (min(until, through) - self.now) / each)
            self.interval.step(done * each, saving=self.flying is not None, steps=done)
            self.now, self.step, steps = self.now + done * each, self.step + done, steps - done
            self.waste.slowed += done * (each - usual)
            self._settle()
        self.now = until if self.now > until - 1e-6 else self.now

    def _save(self, until: float) -> None:
        pause = min(self.policy.pause(self.machine), until - self.now)
        begun, self.last_saved = self.now, self.step
        self.now += pause
        self.waste.paused += pause
        self.waste.saves += 1
        self.interval.saved(pause)
        self._settle()
        if self.now >= until:
            return  # killed before it was written
        self.waiting = (begun, self.step)  # the newest wins
        self._settle()

    def _settle(self) -> None:
        """What is through by now is safe; what waited goes on its way."""
        if self.flying and self.flying[0] <= self.now + 1e-6:
            through, begun, self.durable = self.flying
            self.interval.carried(through - begun)
            self.flying = None
        if self.waiting and not self.flying:
            begun, step = self.waiting
            self.flying, self.waiting = (self.now + self.policy.carry(self.machine), begun, step), None

    def emergency(self, until: float) -> bool:
        """A notice: save what there is time for, then wait for the end. Whether nothing is lost."""
        machine, left = self.machine, until - self.now
        queued = max(0.0, self.flying[0] - self.now) * machine.upload if self.flying else 0.0
        plan = choose(
            step=math.floor(self.step),
            saved_step=math.floor(max(self.durable, self.flying[2] if self.flying else 0.0)),
            full_bytes=int(machine.state),
            trainable_bytes=int(machine.trainable),
            write_rate=machine.write,
            upload_rate=machine.upload,
            seconds_left=left,
            uploads=True,
            must_upload=True,
            queued_bytes=int(queued),
        )
        self.waste.restarted += left
        self.now = until
        self._settle()
        if plan.kind == "full" and plan.reaches_bucket:
            self.durable = self.step
        return self.step - self.durable < 1


def simulate(machine: Machine, policy: Policy, interruptions: Iterable[Interruption], days: float) -> Waste:
    """A run of so many days. Time is `useful`, or wasted in one of four ways, never both."""
    waste, history = Waste(), History()
    now = durable = 0.0
    for item in [*interruptions, Interruption(days * DAY, False)]:
        last = item.at >= days * DAY
        ready = now if now == 0.0 else min(now + machine.restart, item.at)  # every run has a first start
        waste.restarted += ready - now
        process = Process(machine, policy, history, durable, ready, waste)
        heeded = policy.notice if item.announced else 0.0
        process.run(max(ready, item.at - heeded))
        rescued = process.emergency(item.at) if heeded and process.now < item.at else False
        durable = process.step if last else process.durable
        waste.lost += (process.step - durable) * machine.step
        history = History(
            unannounced=history.unannounced + (not rescued),
            days=history.days + (item.at - now) / DAY,
            cost=process.interval.cost,
            carry=process.interval.carry,
        )
        now = item.at
    waste.useful = durable * machine.step
    return waste


# --- many runs ---------------------------------------------------------------------------------------------------


def compare(machine: Machine, policy: Policy, traces: list[list[Interruption]], days: float) -> dict[str, Any]:
    """Median and 90th percentile over the traces; parts are means, so that they add up."""
    runs = [simulate(machine, policy, trace, days) for trace in traces]
    shares = sorted(run.share for run in runs)
    p90 = shares[math.ceil(0.9 * len(shares)) - 1]
    hours, money = days * 24 * machine.gpus, days * 24 * machine.price
    parts = {part: statistics.fmean(getattr(run, part) for run in runs) for part in PARTS}
    return {
        "share": round(statistics.median(shares), 5),
        "share p90": round(p90, 5),
        "gpu hours": round(statistics.median(shares) * hours, 1),
        "gpu hours p90": round(p90 * hours, 1),
        "money": round(statistics.median(shares) * money, 0),
        "money p90": round(p90 * money, 0),
        "mean gpu hours by part": {part: round(value * machine.gpus / HOUR, 2) for part, value in parts.items()},
        "saves": round(statistics.fmean(run.saves for run in runs)),
    }


PARTS = ("paused", "slowed", "lost", "restarted")
RATES = (0.5, 1.0, 2.0, 4.0, 8.0)
USUAL = 2.0  # interruptions a day
INTERVALS = (180, 300, 450, 600, 900, 1200, 1800, 2700, 3600, 5400, 7200)
UPLOADS = (0.1e9, 0.2e9, 0.4e9, 0.8e9, 1.2e9, 1.6e9, 2.4e9, 3.2e9, 6.4e9, 12.8e9)


def study(machine: Machine, days: float, seeds: int, announced: float) -> dict[str, Any]:
    """Every comparison, as plain data."""

    def traces(kind: str, per_day: float, count: int = seeds) -> list[list[Interruption]]:
        return [trace(kind, per_day, days, seed, announced) for seed in range(count)]

    kinds = [("Poisson", rate) for rate in RATES] + [("bursts", USUAL), ("diurnal", USUAL)]
    tables = {
        f"{kind} {per_day:g} a day": {
            policy.name: compare(machine, policy, traces(kind, per_day), days) for policy in POLICIES
        }
        for kind, per_day in kinds
    }
    usual = traces("Poisson", USUAL, max(2, seeds // 2))
    sweep = {
        way: {every: compare(machine, Policy("", background, every), usual, days)["share"] for every in INTERVALS}
        for way, background in (("blocking", False), ("background", True))
    }
    auto = POLICIES[3]
    settled = compare(machine, auto, usual, days)
    sweep["auto"] = {round(days * DAY / max(1, settled["saves"])): settled["share"]}
    lines = {
        policy.name: {
            f"{upload:g}": compare(replace(machine, upload=upload), policy, usual, days)["share"] for upload in UPLOADS
        }
        for policy in (POLICIES[0], *POLICIES[3:])
    }
    return {"policies": tables, "share by interval": sweep, "share by upload rate": lines}


def measured(ranks: int) -> dict[str, float]:
    """Rates of one process as measured, times the ranks; what was not measured is left out."""
    found: dict[str, float] = {}
    with_files = {name: RESULTS / f"{name}.json" for name in ("saving", "transfer")}
    if with_files["saving"].exists():
        saving = json.loads(with_files["saving"].read_text())
        for key, name in (("torch_save", "torch.save + fsync"), ("write", "checkpoint")):
            if "bytes" in saving and (seconds := saving.get("seconds", {}).get(name)):
                found[key] = ranks * saving["bytes"] / seconds
    if with_files["transfer"].exists():
        transfer = json.loads(with_files["transfer"].read_text())
        for key, cell in (("upload", "large up 0 ms"), ("download", "large down 0 ms")):
            found[key] = ranks * transfer["mb"] * 1e6 / transfer["cells"][cell]["wmtp"]["seconds"]
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = replace(Machine(), **measured(Machine.gpus))
    for name, value in asdict(default).items():
        giga = name in ("state", "trainable", "torch_save", "write", "upload", "download")
        shown = value / 1e9 if giga else value
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=(lambda text: float(text) * 1e9) if giga else type(value),
            default=value,
            metavar="GB" if giga else None,
            help=f"{shown:.3g}",
        )
    parser.add_argument("--days", type=float, default=30.0)
    parser.add_argument("--seeds", type=int, default=12, help="traces of each kind")
    parser.add_argument("--announced", type=float, default=0.9, help="share of interruptions with a notice")
    return parser.parse_args()


def main() -> None:
    from common import record
    from fleet_picture import draw

    given = vars(arguments())
    setting = {name: given.pop(name) for name in ("days", "seeds", "announced")}
    machine = Machine(**given)
    result = study(machine, **setting)
    facts = {
        "restart seconds": round(machine.restart),
        "blocking pause": spell(POLICIES[0].pause(machine)),
        "write and upload": spell(POLICIES[3].carry(machine)),
    }
    document = {"simulated": asdict(machine) | setting | facts, **result}
    record("fleet", document)
    draw(document, RESULTS / "fleet.png")


if __name__ == "__main__":
    main()
