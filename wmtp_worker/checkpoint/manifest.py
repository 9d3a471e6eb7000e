"""`manifest.json`: what a checkpoint is made of. It is written last: no manifest, no checkpoint."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from wmtp_worker.errors import CheckpointError, InputError, IntegrityError
from wmtp_worker.storage.atomic import write_text
from wmtp_worker.storage.layout import MANIFEST, step_name
from wmtp_worker.storage.seal import FileEntry, check_each, file_entry

FORMAT_VERSION = 1
SHARED = "shared"
SHARED_SUFFIX = ".safetensors"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


class NewerFormatError(CheckpointError):
    """The checkpoint was made by a newer worker: not damaged, so never passed over."""


class Manifest(BaseModel):
    """The content of `manifest.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = FORMAT_VERSION
    step: int = Field(ge=0)
    run: str
    created: str = Field(description="UTC, ISO 8601")
    lease_epoch: int = 0
    settings_digest: str
    base_model_digest: str | None = None
    world_size: int = 1
    tracking_run_id: str | None = None
    trainable: Literal["all", "part"] = "all"
    kind: Literal["full", "trainable"] = Field(
        "full",
        description="trainable: saved in a hurry, without the optimizer's state; only an explicit resume takes it",
    )
    worker_version: str
    torch_version: str
    files: dict[str, FileEntry]
    shared: dict[str, FileEntry] = Field({}, description="frozen tensors, kept once a run under their SHA-256")

    @property
    def bytes(self) -> int:
        """Bytes of everything it names."""
        return sum(entry.size for entry in (*self.files.values(), *self.shared.values()))

    def write(self, folder: Path) -> None:
        write_text(folder / MANIFEST, self.model_dump_json(indent=1) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Raises `NewerFormatError`, or `CheckpointError` where the manifest is missing or malformed."""
    try:
        data = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"no {MANIFEST}", where=str(folder)) from None
    except OSError as error:
        raise CheckpointError(f"{MANIFEST} cannot be read: {error.strerror}", where=str(folder)) from None
    return parse_manifest(data, folder.name, str(folder))


def parse_manifest(data: bytes, name: str, where: str) -> Manifest:
    """The manifest of the checkpoint folder called `name`. Raises `NewerFormatError` and `CheckpointError`."""
    try:
        document = json.loads(data)
        version = document["format_version"]
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise NewerFormatError(
                f"checkpoint format {version} is newer than this worker's {FORMAT_VERSION}",
                where=f"{where}/{MANIFEST}",
                fix="use a newer worker, or another run name",
            )
        manifest = Manifest.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{MANIFEST} is malformed: {key}: {first['msg']}", where=where) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{MANIFEST} is malformed: {error!r}", where=where) from None
    if name != step_name(manifest.step):
        raise CheckpointError(f"{MANIFEST} is of step {manifest.step}", where=where)
    for file in (*manifest.files, *manifest.shared):
        if not _PLAIN_NAME.fullmatch(file):
            raise CheckpointError(f"{MANIFEST} names a file outside its folder, or none: {file!r}", where=where)
    return manifest


def shared_path(folder: Path, entry: FileEntry) -> Path:
    """Where the shared file lies that the manifest of the checkpoint `folder` names."""
    return folder.parent / SHARED / f"{entry.sha256}{SHARED_SUFFIX}"


def verify(folder: Path, rank: int = 0, world: int = 1, entry_of: Callable[[Path], FileEntry] = file_entry) -> Manifest:
    """The manifest, after every file's size and SHA-256 were found right. Raises `CheckpointError` at the first not.

    Of `world` ranks that verify together, each reads its share of the files. `entry_of` reads one; see `check_each`.
    """
    manifest = read_manifest(folder)
    files = [(folder, name, entry) for name, entry in manifest.files.items()]
    shared = (shared_path(folder, entry) for entry in manifest.shared.values())
    files += [(path.parent, path.name, entry) for path, entry in zip(shared, manifest.shared.values(), strict=True)]
    # the largest first, so that the two that are read at once end together
    files.sort(key=lambda file: -file[2].size)
    try:
        check_each(files[rank::world], entry_of)
    except (IntegrityError, InputError) as error:
        raise CheckpointError(error.what, where=str(folder)) from None
    return manifest
