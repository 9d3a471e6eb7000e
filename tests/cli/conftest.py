"""The command, called as its entry point is, in this process: starting one anew costs a second each time."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from wmtp_worker.cli import main
from wmtp_worker.host.stop import STOP

OURS = ("WMTP_", "CLOUD_", "HF_", "AWS_")


@dataclass(frozen=True)
class Done:
    stdout: str
    stderr: str


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """`command("sync", "ls", …, code=78, NAME=value)`: run `wmtp` in an empty folder and look at its exit code."""
    here = tmp_path / "here"
    here.mkdir()
    fixed = {"WMTP_ENV_FILE": os.devnull, "COLUMNS": "200", "AWS_EC2_METADATA_DISABLED": "true"}

    def run(*arguments: object, code: int = 0, **environ: str) -> Done:
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.chdir(here)
            for name in list(os.environ):
                if name.startswith(OURS):
                    patch.delenv(name)
            for name, value in (fixed | environ).items():
                patch.setenv(name, value)
            try:
                ended = main([str(argument) for argument in arguments])
            finally:
                STOP.uninstall()
        done = Done(*capsys.readouterr())
        assert ended == code, done.stderr
        assert "Traceback" not in done.stderr
        return done

    return run
