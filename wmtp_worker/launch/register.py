"""The jobs that were launched from this machine: one small JSON file each, without secrets."""

import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from wmtp_worker.errors import InputError, SettingsError
from wmtp_worker.launch.request import JOB_NAME
from wmtp_worker.storage.atomic import write_json


@dataclass(frozen=True)
class Record:
    """Where a job is. `facts` are its host's own; `cloud` says which bucket it publishes to; `began` is Unix time."""

    name: str
    kind: str
    run: str
    where: str
    command: str
    facts: dict[str, str] = field(default_factory=dict)
    cloud: dict[str, str | None] = field(default_factory=dict)
    began: float = field(default_factory=time.time)


def folder() -> Path:
    """`$XDG_STATE_HOME/wmtp/launched`, by default under ~/.local/state."""
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "wmtp" / "launched"


def path_of(name: str) -> Path:
    return folder() / f"{name}.json"


def check_writable() -> None:
    """Raise `SettingsError` where no job could be remembered: what is rented then, nobody would find to stop it."""
    try:
        folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder()):
            pass
    except OSError as error:
        raise SettingsError(
            f"launched jobs cannot be remembered: {error}",
            where=str(folder()),
            fix="set XDG_STATE_HOME to a folder that can be written",
        ) from error


def remember(record: Record) -> None:
    """Atomic; takes the place of a job of the same name."""
    write_json(path_of(record.name), asdict(record))


def recall(name: str) -> Record:
    """Raises `InputError` where no such job was launched from here."""
    path = path_of(name)
    if not JOB_NAME.fullmatch(name) or not path.is_file():
        known = ", ".join(record.name for record in every()) or "none"
        raise InputError(f"no job named {name} was launched from here", where=str(folder()), fix=f"there are: {known}")
    return _read(path)


def every() -> list[Record]:
    """All jobs, the newest first."""
    return sorted(map(_read, folder().glob("[!.]*.json")), key=lambda record: -record.began)


def _read(path: Path) -> Record:
    try:
        document: Any = json.loads(path.read_text(encoding="utf-8"))
        return Record(**document)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error}", where=str(path), fix="delete it") from error
