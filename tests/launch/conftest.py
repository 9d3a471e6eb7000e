"""The command as a person calls it at a laptop: a home of its own, and the keys of the bucket in its environment."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Done, command  # noqa: F401
from tests.servers.sshd import Sshd, sshd  # noqa: F401

STAND_IN = """#!/bin/sh
# stands in for the worker: what it was given, lines, and 75 when it is asked to stop
trap 'echo saving; sleep 0.3; exit 75' TERM
echo "arguments: $*"
echo "workdir: $WMTP_WORKDIR"
echo "key: ${AWS_ACCESS_KEY_ID:+is here}"
while [ ! -f "$WMTP_WORKDIR/end" ]; do echo "line $((i = i + 1))"; sleep 0.1; done
exit "$(cat "$WMTP_WORKDIR/end")"
"""
KEY, SECRET = "PLANTEDACCESSKEY00", "planted/secret+key-of-nobody"


@dataclass(frozen=True)
class Laptop:
    """`launch("ssh", …, code=78)` is `wmtp launch ssh …` there, `environ` are its variables."""

    home: Path
    environ: dict[str, str]
    run: Callable[..., Done]

    def launch(self, *arguments: object, code: int = 0, **environ: str) -> Done:
        return self.run("launch", *arguments, code=code, **(self.environ | environ))

    @property
    def registered(self) -> list[Path]:
        return sorted((self.home / ".local/state/wmtp/launched").glob("*"))


@pytest.fixture
def laptop(command: Callable[..., Done], tmp_path: Path, monkeypatch: Any) -> Laptop:  # noqa: F811
    home = tmp_path / "laptop"
    home.mkdir()
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    environ = {
        "HOME": str(home),
        "CLOUD_PROVIDER": "s3",
        "CLOUD_BUCKET": "lab",
        "CLOUD_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_CONFIG_FILE": str(home / "no-config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(home / "no-credentials"),
    }
    return Laptop(home, environ, command)


@pytest.fixture
def host(sshd: Sshd, laptop: Laptop, tmp_path: Path) -> Sshd:  # noqa: F811
    """A host that the laptop knows and may enter, with a checkout whose start.sh stands in for the worker."""
    (laptop.home / ".ssh").symlink_to(sshd.client_home / ".ssh")
    sshd.know()
    sshd.relay.up()
    start = sshd.home / "wmtp-worker" / "entrypoint" / "start.sh"
    start.parent.mkdir(parents=True, exist_ok=True)
    start.write_text(STAND_IN)
    return sshd
