"""`run.json`: what a tracking server is told of a run besides its numbers. Written by the worker, server or not."""

import json
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from wmtp_worker.storage.atomic import write_text

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]
BestModel = Literal["link", "upload", "move"]


class TrackedRun(BaseModel):
    """One run, as a tracking server shall have it. `key` makes it the same run on every machine and server."""

    model_config = ConfigDict(extra="ignore")

    key: str = Field(default_factory=lambda: secrets.token_hex(16))
    run: str
    experiment: str
    created: float = Field(default_factory=time.time, description="Unix time at which the run first began")
    status: Status = "RUNNING"
    ended: float | None = None
    home: str | None = Field(None, description="URL of its checkpoints in a bucket, where it has one")
    settings_digest: str
    best_model: BestModel = Field("link", description="tracking.best_model: what a finished run's sender does with it")
    fresh: bool = Field(True, description="no earlier record was found: a server may know of one")
    previous: str | None = Field(None, description="key of the run that this one branched off, by --resume")
    tags: dict[str, str] = {}
    params: dict[str, str] = {}

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """The record in this file; None where there is none that can be read."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError, RecursionError):
            return None

    def write(self, path: Path) -> None:
        """Replace the file, atomically. Raises `DiskFullError`, `InputError`."""
        write_text(path, self.model_dump_json(indent=1) + "\n")

    def continued_by(self, new: "TrackedRun", start: int, resume: str | int) -> "TrackedRun":
        """The record of a process that begins after step `start`: this run's, or that of a new one.

        A run goes on after whatever interrupted it. Going back on purpose makes another, and so does beginning anew
        what was finished, had failed, or was set otherwise: the steps of that are not these.
        """
        anew = start == 0 and (self.status in ("FINISHED", "FAILED") or self.settings_digest != new.settings_digest)
        if resume != "auto" or anew:
            return new.model_copy(update={"fresh": False, "previous": self.key})
        kept = {"key": self.key, "created": self.created, "previous": self.previous, "fresh": self.fresh}
        return new.model_copy(update=kept)


def read_servers(path: Path) -> dict[str, dict[str, Any]]:
    """Tracking URI to what that server calls the run (`run_id`, `experiment_id`, `url`)."""
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def write_server(path: Path, uri: str, known: Mapping[str, Any]) -> None:
    """Remember it, beside other servers. Raises `DiskFullError`, `InputError`."""
    write_text(path, json.dumps({**read_servers(path), uri: dict(known)}, indent=1) + "\n")
