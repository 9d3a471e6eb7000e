"""The real command, to be killed: started anew, or forked from a process that has loaded the modules already.

Loading torch and transformers takes most of the time of a tiny run, and is the same each time.
"""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.kills.strikes import Strike, arm
from wmtp_worker.cli import main

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["wmtp_worker.training.run"])


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
    ) -> None:
        """`strike` is a signal that the process, which must be a forked one, sends itself at some line."""
        arguments = ["train", "--run-name", "tiny", *(part for setting in settings for part in ("--set", setting))]
        environment = {**os.environ, **variables, "WMTP_WORKDIR": str(workdir)}
        self._process: subprocess.Popen[bytes] | multiprocessing.process.BaseProcess
        output.touch()
        if fork:
            self._process = _forks.Process(target=_run, args=(arguments, environment, workdir, output, strike))
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
        """Its exit code; minus the signal that ended it."""
        if isinstance(self._process, subprocess.Popen):
            return self._process.wait(timeout)
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


def _run(arguments: list[str], environment: dict[str, str], workdir: Path, output: Path, strike: Strike | None) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(workdir)
    with output.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if strike is not None:
        arm(strike)
    sys.exit(main(arguments))
