"""`lease.json`: who holds a run in the bucket, under which epoch, and from where each epoch went on."""

import json
import os
import socket
import uuid
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from wmtp_worker.errors import CheckpointError, IntegrityError, ObjectNotFound
from wmtp_worker.storage.atomic import write_text
from wmtp_worker.storage.objects import ObjectStore

FORMAT_VERSION = 1
_LARGEST = 16 << 20


class Holder(BaseModel):
    """A process. `nonce` is different for each; `workdir_id` is the same for all that use one work directory."""

    model_config = ConfigDict(frozen=True)

    host: str
    pid: int
    workdir_id: str | None = None
    nonce: str

    @classmethod
    def this(cls, workdir_id: str | None) -> Self:
        """The process we are in."""
        return cls(host=socket.gethostname(), pid=os.getpid(), workdir_id=workdir_id, nonce=uuid.uuid4().hex)

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}"


class LeaseFile(BaseModel):
    """The content of `lease.json`. No two writes of it are the same bytes: a version is never seen twice."""

    model_config = ConfigDict(frozen=True)

    format_version: int = FORMAT_VERSION
    epoch: int = Field(ge=1)
    holder: Holder
    seconds: float = Field(gt=0, description="how long the lease lasts after each renewal")
    released: bool = False
    renewals: int = Field(default=0, ge=0)
    epochs: tuple[tuple[int, int], ...] = Field(default=(), description="each epoch and the step it went on from")

    def data(self) -> bytes:
        return (self.model_dump_json(indent=1) + "\n").encode()


def counts(epochs: tuple[tuple[int, int], ...], step: int, epoch: int) -> bool:
    """Whether what `epoch` published of `step` may be gone on from: no later epoch went on from an earlier step.

    A worker that was taken for dead may publish at any later time. What that is was not there, or was not wanted, when
    the next one chose where to go on, and is no part of the run's history.
    """
    return not any(later > epoch and start < step for later, start in epochs)


@dataclass(frozen=True)
class Found:
    """A lease file as it is in the bucket: None where its content is none."""

    file: LeaseFile | None
    version: str
    modified: datetime | None


def read_lease(store: ObjectStore, key: str) -> Found | None:
    """The lease file, None where there is none. Raises `CheckpointError` for one of a newer format."""
    try:
        info, data = store.get(key, 0, _LARGEST)
    except ObjectNotFound:
        return None
    try:
        document = json.loads(bytes(data))
        if isinstance(version := document["format_version"], int) and version > FORMAT_VERSION:
            raise CheckpointError(
                f"lease format {version} is newer than this worker's {FORMAT_VERSION}",
                where=f"{store.url}/{key}",
                fix="use a newer worker, or another run name",
            )
        file = LeaseFile.model_validate(document)
    except (ValidationError, ValueError, KeyError, TypeError, RecursionError):
        return Found(None, info.version, info.modified)
    return Found(file, info.version, info.modified)


def read_epochs(store: ObjectStore, key: str) -> tuple[tuple[int, int], ...]:
    """Where each epoch went on from, as far as the bucket tells. Raises `IntegrityError` where the file is damaged."""
    found = read_lease(store, key)
    if found is None:
        return ()
    if found.file is None:
        fix = "see what is in it; if no worker trains this run, delete it"
        raise IntegrityError("the lease is malformed", where=f"{store.url}/{key}", fix=fix)
    return found.file.epochs


def workdir_id(state: Path) -> str:
    """What this work directory is known by, kept in its private folder `state`. A copy of it is another one.

    Who holds the run's local lock and finds a lease of the same directory knows that its holder is gone.
    """
    path = state / "workdir-id"
    try:
        name, inode = path.read_text(encoding="utf-8").split()
        if int(inode) == path.stat().st_ino:
            return name
    except (OSError, ValueError):
        pass
    name = uuid.uuid4().hex
    write_text(path, name)
    # known by its own place on the disk, which no copy has
    with path.open("a", encoding="utf-8") as file:
        file.write(f" {os.fstat(file.fileno()).st_ino}\n")
    return name
