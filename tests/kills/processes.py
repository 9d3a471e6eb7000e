"""The real command, to be killed: started anew, or forked from a process that has loaded the modules already.

Loading torch and transformers takes most of the time of a tiny run, and is the same each time.
"""

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.kills.strikes import Strike, arm, count
from wmtp_worker.cli import main
from wmtp_worker.host.stop import STOP

_forks = multiprocessing.get_context("forkserver")
# one that is missing is left out
_forks.set_forkserver_preload(
    [
        "wmtp_worker.training.run",
        "wmtp_worker.cli.app",
        *(f"wmtp_worker.storage.{name}" for name in ("s3", "gcs", "azure")),
    ]
)


class Worker:
    """`wmtp train` of the run "tiny" in a process of its own; what it says is added to `output`."""

    def __init__(
        self,
        workdir: Path,
        settings: tuple[str, ...],
        output: Path,
        variables: Mapping[str, str],
        *,
        fork: bool,
        strike: Strike | None = None,
        change: Callable[[], None] | None = None,
        lines: Path | None = None,
    ) -> None:
        """The rest is for a forked process: `strike` is a signal that it sends itself at some line, `change` is called
        first, and `lines` becomes a file with the number of lines that it ran, by phase. A forked one makes no report.
        """
        arguments = ["train", "--run-name", "tiny", *(part for setting in settings for part in ("--set", setting))]
        environment = {**os.environ, **variables, "WMTP_WORKDIR": str(workdir)}
        self._process: subprocess.Popen[bytes] | multiprocessing.process.BaseProcess
        output.touch()
        if fork:
            given = (arguments, environment, workdir, output, strike, change, lines)
            self._process = _forks.Process(target=_run, args=given)
            self._process.start()
            return
        with output.open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "wmtp_worker", *arguments],
                env=environment,
                cwd=workdir,
                stdout=file,
                stderr=file,
            )

    def running(self) -> bool:
        if isinstance(self._process, subprocess.Popen):
            return self._process.poll() is None
        return self._process.is_alive()

    def wait(self, timeout: float) -> int | None:
        """Its exit code, or minus the signal that ended it; None where it still runs after `timeout` seconds."""
        if isinstance(self._process, subprocess.Popen):
            try:
                return self._process.wait(timeout)
            except subprocess.TimeoutExpired:
                return None
        self._process.join(timeout)
        return self._process.exitcode

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def kill(self) -> None:
        """SIGKILL, and wait."""
        self._process.kill()
        self.wait(timeout=60)


def _run(
    arguments: list[str],
    environment: dict[str, str],
    workdir: Path,
    output: Path,
    strike: Strike | None,
    change: Callable[[], None] | None,
    lines: Path | None,
) -> None:
    from wmtp_worker.training import report

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(workdir)
    with output.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # a report takes longer than all the rest
    report.write_report = lambda records, path: path.touch()
    if change is not None:
        change()
    # before this, which is the first thing that the command does, signals end any Python
    STOP.install()
    if strike is not None:
        arm(strike)
    counted = count() if lines is not None else {}
    code = main(arguments)
    if lines is not None:
        lines.write_text(json.dumps(counted))
    sys.exit(code)
