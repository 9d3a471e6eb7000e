"""Chains of struck processes of one run, and what may never come out of them: torn, lost or wrong work."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.kills.processes import Worker
from tests.kills.strikes import PHASES, Strike
from tests.servers.base import Server
from wmtp_worker.checkpoint.manifest import verify
from wmtp_worker.errors import CheckpointError, IntegrityError, ObjectNotFound
from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.storage.open import open_store
from wmtp_worker.storage.runs import RunSync
from wmtp_worker.storage.transfer import Transfer

RUN = "tiny"
LIMIT = 120.0  # seconds for any one process
# what a lease that nobody renews costs whoever comes next; a stopped worker has to outsleep it
LEASE = 3
SETTINGS = (f"checkpoint.lease_seconds={LEASE}", "checkpoint.lease_wait=30")
# lines that the shortest and the longest of the runs here spend in a phase, about; those not reached strike nobody
REACH: Mapping[str, int] = {
    "copy": 600,
    "write": 1500,
    "settle": 1000,
    "upload": 6000,
    "publish": 2500,
    "retain": 1500,
    "lease": 700,
    "anywhere": 20_000,
}


@dataclass
class Tally:
    """What happened, in numbers, and each wrong thing in words."""

    kills: int = 0  # SIGKILL
    stops: int = 0  # SIGTERM
    stalls: int = 0  # SIGSTOP for longer than the lease
    wipes: int = 0
    torn: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def strikes(self) -> int:
        return self.kills + self.stops + self.stalls

    @property
    def problems(self) -> list[str]:
        return self.torn + self.lost + self.wrong


class Chain:
    """One run, struck again and again on machines that come and go, until it may end."""

    def __init__(
        self,
        server: Server,
        settings: tuple[str, ...],
        folder: Path,
        seed: str,
        environ: Callable[[Mapping[str, str]], Any],
    ) -> None:
        """`environ` is a context in which variables are set: to look into the bucket from here."""
        self.tally = Tally()
        self._server = server
        self._bucket = server.make_bucket()
        self._variables = server.variables(self._bucket)
        self._settings = (*settings, *SETTINGS)
        self._folder = folder
        self._random = random.Random(seed)
        self._environ = environ
        self._machines = 0
        self._workdir = self._new_machine()
        self._published = 0

    def _new_machine(self) -> Path:
        self._machines += 1
        workdir = self._folder / f"machine{self._machines}"
        workdir.mkdir()
        return workdir

    def _start(self, workdir: Path, strike: Strike | None = None) -> Worker:
        output = workdir.with_suffix(".txt")
        return Worker(workdir, self._settings, output, self._variables, fork=True, strike=strike)

    def strike(self) -> bool:
        """Let one process run until it is struck; whether it was (some end before)."""
        phase = self._random.choice(list(PHASES))
        # early lines are reached more often: a process that goes on has less left to do
        line = 1 + int(REACH[phase] * self._random.random() ** 2)
        number = self._random.choices((signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP), (14, 5, 1))[0]
        where = f"{signal.Signals(number).name} at line {line} of {phase}"
        worker = self._start(self._workdir, Strike(phase, line, number))
        if number == signal.SIGSTOP:
            return self._stall(worker, where)
        code = worker.wait(LIMIT)
        if code is None:
            worker.kill()
            self.tally.wrong.append(f"hung after {where}: {self._said(self._workdir)}")
        elif code == -signal.SIGKILL:
            self.tally.kills += 1
        elif code == 75:
            self.tally.stops += 1
        elif code != 0:
            self.tally.wrong.append(f"ended with {code} after {where}: {self._said(self._workdir)}")
        self.look(where)
        if self._random.random() < 0.4:
            self.tally.wipes += 1
            shutil.rmtree(self._workdir)
            self._workdir = self._new_machine()
        return code != 0

    def _stall(self, worker: Worker, where: str) -> bool:
        """The worker has stopped itself: another one takes the run over and ends it; then the first one wakes up."""
        while worker.running() and not _is_stopped(worker.pid):
            time.sleep(0.02)
        if not worker.running():
            self.look(where)
            return False
        self.tally.stalls += 1
        time.sleep(LEASE + 2)
        rival = self._new_machine()
        code = self._start(rival).wait(LIMIT)
        before = self._contents()
        os.kill(worker.pid, signal.SIGCONT)
        woken = worker.wait(LIMIT)
        # one that was stopped before it had, or after it gave up, the lease has nothing to be told
        if code != 0 or woken not in (79, 0, 75):
            self.tally.wrong.append(f"{where}: the other ended with {code}, it with {woken}: {self._said(rival)}")
        if woken == 79 and self._contents() != before:
            self.tally.wrong.append(f"{where}: a stale worker changed what is published")
        self.look(where)
        self._workdir = rival
        return True

    def look(self, where: str) -> None:
        """Whatever is visible, here and in the bucket, must be whole; and nothing that was safe may be gone."""
        paths = RunPaths(self._workdir, RUN)
        for step in paths.steps():
            try:
                verify(paths.step(step))
            except CheckpointError as error:
                self.tally.torn.append(f"{where}: {error}")
        with self._open() as side:
            steps = side.published_steps()
            for step in steps:
                try:
                    side.fetch_checkpoint(step)
                except (IntegrityError, ObjectNotFound) as error:
                    self.tally.torn.append(f"{where}: in the bucket: {error}")
        newest = max(steps, default=0)
        if newest < self._published:
            self.tally.lost.append(f"{where}: the bucket had step {self._published}, has {newest}")
        self._published = newest

    def _open(self) -> "_Side":
        return _Side(self)

    def _contents(self) -> dict[str, str]:
        """Key and version of every checkpoint's object in the bucket."""
        with self._open() as side:
            return {info.key: info.version for info in side.store.list(side.keys.prefix) if "/step_" in info.key}

    def finish(self, record: Callable[[Path], dict[str, Any]], reference: dict[str, Any]) -> Tally:
        """Let it end; what it leaves must be what the undisturbed run left."""
        code = self._start(self._workdir).wait(LIMIT)
        if code != 0:
            self.tally.wrong.append(f"the last process ended with {code}: {self._said(self._workdir)}")
        elif record(self._workdir) != reference:
            self.tally.wrong.append("it is not what the undisturbed run left")
        self.look("the end")
        return self.tally

    def _said(self, workdir: Path) -> str:
        return workdir.with_suffix(".txt").read_text()[-1500:]


class _Side:
    """The bucket, seen from a machine that has nothing."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain

    def __enter__(self) -> RunSync:
        chain = self._chain
        self._folder = chain._folder / "look"
        self._variables = chain._environ(chain._variables)
        self._variables.__enter__()
        self._store = open_store(chain._server.cloud(chain._bucket))
        self._transfer = Transfer(self._store, self._folder / "state", concurrency=4)
        return RunSync(self._transfer, RunPaths(self._folder, RUN))

    def __exit__(self, *error: object) -> None:
        self._transfer.close()
        self._store.close()
        self._variables.__exit__(None, None, None)
        shutil.rmtree(self._folder, ignore_errors=True)


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False
