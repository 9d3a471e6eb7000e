"""Chains of struck processes, and what may never come out of them: torn, lost or wrong work."""

import json
import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.kills.onlooker import Onlooker, on_disk, trained_steps
from tests.kills.processes import Worker
from tests.kills.strikes import PHASES, Strike
from tests.servers.base import Server

LIMIT = 120.0  # seconds for any one process
SETTINGS = (
    "checkpoint.buffers=2",
    # what is struck is the same with half of the work between the saves
    "training.accumulation=1",
    "evaluation.max_batches=1",
    # what a lease that nobody renews costs whoever comes next
    "checkpoint.lease_seconds=3",
    "checkpoint.lease_wait=30",
)
# signals that a worker answers by saving: it ends with 75, or with 0 where it was about to end
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_TRIES = 6  # a process that ends before the line is reached counts for nothing

Record = Callable[[Path], dict[str, Any]]


@dataclass(frozen=True)
class Variation:
    """A way to train the run: `change` is called in each of its processes before anything else."""

    name: str
    settings: tuple[str, ...] = ()
    change: Callable[[], None] | None = None
    frozen: bool = False  # whether some tensors are: then others come out

    @property
    def phases(self) -> list[str]:
        return [phase for phase in PHASES if phase != "shared" or self.frozen]


def freeze() -> None:
    """The first layer is not trained: its tensors are kept once a run, and published once."""
    from wmtp_worker.training import stages

    build = stages.build

    def frozen(*arguments: Any) -> Any:
        model = build(*arguments)
        model.model.layers[0].requires_grad_(False)
        return model

    stages.build = frozen


def hurry() -> None:
    """The best interval of a run that lasts a second, and is interrupted as often."""
    from wmtp_worker.checkpoint import interval

    interval.FIRST, interval.SHORTEST = 0.1, 0.05


# five of them and six providers: in time each with each
VARIATIONS = (
    Variation("plain"),
    Variation("frozen", change=freeze, frozen=True),
    Variation("plain"),
    Variation("auto", ("checkpoint.every=auto", "checkpoint.interruptions_per_day=1000000"), hurry),
    Variation("blocking", ("checkpoint.background=false",)),
)


@dataclass
class Tally:
    """What happened, in numbers, and each wrong thing in words."""

    struck: Counter[tuple[str, str, str]] = field(default_factory=Counter)  # by signal, phase and fate of the disk
    missed: int = 0  # processes that ended before the line
    runs: int = 0  # that came to their end, and were compared
    torn: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        return self.torn + self.lost + self.wrong


def plan(number: int, kills: int, seed: str, phases: Sequence[str]) -> Iterator[tuple[str, signal.Signals]]:
    """Phase and signal of each strike of chain `number`: so many kills, half as many stops, in some chains a stall.

    The phases of the kills go on from chain to chain, so that each has its turn.
    """
    chosen = [(phases[(number * kills + turn) % len(phases)], signal.SIGKILL) for turn in range(kills)]
    generator = random.Random(f"{seed}/{number}")
    for turn in range(kills // 2):
        chosen.append((generator.choice(phases), STOPS[(number * (kills // 2) + turn) % len(STOPS)]))
    if number % 3 == 0:
        chosen.append((generator.choice(phases), signal.SIGSTOP))
    generator.shuffle(chosen)
    yield from chosen


class Chain:
    """Runs that are struck again and again on machines that come and go; one that has ended is followed by another."""

    def __init__(
        self,
        server: Server,
        settings: tuple[str, ...],
        variation: Variation,
        folder: Path,
        seed: str,
        lines: Mapping[str, int],
        record: Record,
        reference: dict[str, Any],
    ) -> None:
        """`lines` is how many lines of each phase the undisturbed run has, `reference` what it leaves by `record`.

        The server's credentials have to be in the environment.
        """
        self.tally = Tally()
        self._server = server
        self._settings = (*settings, *SETTINGS, *variation.settings)
        self._change = variation.change
        self._steps = next(int(part.partition("=")[2]) for part in settings if part.startswith("training.max_steps="))
        self._folder = folder
        self._random = random.Random(seed)
        self._lines = lines
        self._record, self._reference = record, reference
        self._names = iter(range(10**6))
        self._begin_run()

    # --- runs and machines -----------------------------------------------------------------------------------

    def _begin_run(self) -> None:
        self._bucket = self._server.make_bucket()
        self._variables = self._server.variables(self._bucket)
        self._onlooker = Onlooker(self._server.cloud(self._bucket), self._folder / f"look{next(self._names)}")
        self._in_bucket = 0  # the newest step
        self._begin_machine()

    def _begin_machine(self) -> None:
        self._workdir = self._folder / f"machine{next(self._names)}"
        self._workdir.mkdir()
        self._on_disk = 0  # the newest step
        self._heard = 0  # of what its processes said

    def _start(self, strike: Strike | None = None) -> Worker:
        output = self._workdir.with_suffix(".txt")
        return Worker(
            self._workdir, self._settings, output, self._variables, fork=True, strike=strike, change=self._change
        )

    def _end_run(self) -> None:
        """A run that came to its end must have left what the undisturbed one left."""
        self.tally.runs += 1
        if self._record(self._workdir) != self._reference:
            self.tally.wrong.append(f"not what the undisturbed run left: {self._workdir}")
        self._onlooker.close()
        self._begin_run()

    def finish(self) -> Tally:
        """Let the last run come to its end."""
        worker = self._start()
        if (code := self._wait(worker)) == 0:
            self.look("the end")
            self._end_run()
        else:
            self.tally.wrong.append(f"the last process ended with {code}: {self._said()}")
        self._onlooker.close()
        return self.tally

    # --- strikes ---------------------------------------------------------------------------------------------

    def strike(self, phase: str, number: signal.Signals) -> None:
        """Start processes until one is struck there."""
        share = self._random.random() ** 2  # early lines are reached more often: who goes on has less left to do
        for _ in range(_TRIES):
            left = 1 - max(self._in_bucket, self._on_disk) / self._steps
            line = 1 + int(self._lines[phase] * left * share)
            mark = self._folder / f"strike{next(self._names)}"
            strike = Strike(phase, line, number, mark)
            worker = self._start(strike)
            code = self._stall(worker, strike) if number == signal.SIGSTOP else self._wait(worker)
            if strike.happened:
                self._after(strike, code)
                return
            self.tally.missed += 1
            self.look(str(strike))
            if code != 0:
                self.tally.wrong.append(f"ended with {code}, struck by nobody: {self._said()}")
            self._end_run()
            share /= 2
        self.tally.wrong.append(f"no process could be struck by {number.name} in {phase}")

    def _after(self, strike: Strike, code: int | None) -> None:
        expected = {signal.SIGKILL: (-signal.SIGKILL,), signal.SIGSTOP: (0,)}.get(strike.number, (75, 0))
        if code not in expected:
            self.tally.wrong.append(f"ended with {code} after {strike}: {self._said()}")
        self.look(str(strike))
        if code == 75:
            self._check_stop(strike)
        wiped = code != 0 and self._random.random() < 0.3
        self.tally.struck[strike.number.name, strike.phase, "wiped" if wiped else "kept"] += 1
        if code == 0:
            self._end_run()
        elif wiped:
            shutil.rmtree(self._workdir)
            self._begin_machine()

    def _wait(self, worker: Worker) -> int | None:
        code = worker.wait(LIMIT)
        if code is None:
            self.tally.wrong.append(f"hangs: {self._said()}")
            worker.kill()
        return code

    def _stall(self, worker: Worker, strike: Strike) -> int | None:
        """The worker has stopped itself: another one takes the run over and ends it; then the first one wakes up.

        Returns the exit code of the other one; of the worker's own where it was never stopped.
        """
        until = time.monotonic() + LIMIT
        while worker.running() and not _is_stopped(worker.pid):
            if time.monotonic() > until:
                return self._wait(worker)
            time.sleep(0.02)
        if not worker.running():
            return self._wait(worker)
        stale = self._workdir
        self._begin_machine()
        code = self._wait(self._start())
        before = self._onlooker.published()
        os.kill(worker.pid, signal.SIGCONT)
        woken = self._wait(worker)
        # one that was stopped before it had, or after it gave up, the lease has nothing to be told
        if woken not in (79, 0, 75):
            self.tally.wrong.append(f"{strike}: it woke up and ended with {woken}: {_tail(stale)}")
        after = self._onlooker.published()
        # unless it took the lease, which nobody had any more
        if after != before and after.epoch == before.epoch:
            self.tally.wrong.append(f"{strike}: a stale worker changed what is published")
        return code

    # --- what may never be -----------------------------------------------------------------------------------

    def look(self, where: str) -> None:
        """Whatever is visible, here and in the bucket, must be whole; and nothing that was safe may be gone."""
        said = self._hear()
        here, torn = on_disk(self._workdir)
        there, torn_there = self._onlooker.in_bucket()
        self.tally.torn += [f"{where}: {problem}" for problem in (*torn, *torn_there)]
        safe_here = max(self._on_disk, _newest(r"saved step_(\d+):", said))
        safe_there = max(self._in_bucket, _newest(r"step_(\d+) is in the bucket", said))
        if here < safe_here:
            self.tally.lost.append(f"{where}: step {safe_here} was safe on the disk, now it is step {here}")
        if there < safe_there:
            self.tally.lost.append(f"{where}: step {safe_there} was safe in the bucket, now it is step {there}")
        self._on_disk, self._in_bucket = here, there

    def _check_stop(self, strike: Strike) -> None:
        """Whoever was asked to stop while it trained has saved its last step, here and in the bucket."""
        said = self._last_said
        if "M parameters" not in said:  # it had not begun
            return
        taken = trained_steps(self._workdir)
        if self._on_disk != taken:
            self.tally.lost.append(f"{strike}: {taken} steps were taken, saved is step {self._on_disk}")
        if self._in_bucket != taken and not re.search("not in the bucket|in the bucket yet", said):
            self.tally.lost.append(f"{strike}: {taken} steps were taken, in the bucket is step {self._in_bucket}")

    def _hear(self) -> str:
        """What processes said on this machine since the last time."""
        said = self._workdir.with_suffix(".txt").read_text()
        self._last_said, self._heard = said[self._heard :], len(said)
        return self._last_said

    def _said(self) -> str:
        return _tail(self._workdir)


def reference_of(
    variation: Variation, settings: tuple[str, ...], server: Server, folder: Path, record: Record
) -> tuple[dict[str, Any], dict[str, int]]:
    """What the run leaves that nobody disturbs, and how many lines of each phase it has."""
    workdir, lines, output = folder / "reference", folder / "lines.json", folder / "reference.txt"
    workdir.mkdir(parents=True)
    worker = Worker(
        workdir,
        (*settings, *SETTINGS, *variation.settings),
        output,
        server.variables(server.make_bucket()),
        fork=True,
        change=variation.change,
        lines=lines,
    )
    assert worker.wait(LIMIT) == 0, output.read_text()
    return record(workdir), json.loads(lines.read_text())


def _newest(pattern: str, said: str) -> int:
    return max(map(int, re.findall(pattern, said)), default=0)


def _tail(workdir: Path) -> str:
    return workdir.with_suffix(".txt").read_text()[-1500:]


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False
