"""Sealed folders: `manifest.json`, written last, names every file with size and SHA-256. No manifest, no folder.

Checkpoints are sealed folders, and so are models and data sets that were pushed with their digests. How they travel is
in `sealed`.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from wmtp_worker.errors import InputError, IntegrityError, ObjectNotFound
from wmtp_worker.storage.atomic import write_text
from wmtp_worker.storage.layout import MANIFEST, SHARED, blob_name
from wmtp_worker.storage.transfer.paths import check_key, safe_path

_BLOCK = 1 << 20


class FileEntry(BaseModel):
    model_config = ConfigDict(frozen=True)

    size: int = Field(ge=0, lt=1 << 50, description="bytes")
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Seal(BaseModel):
    """What every manifest has, whatever else is in it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    files: dict[str, FileEntry]
    # what else manifests of checkpoints have: tensors that never change, kept once for all steps; whether all that a
    # resume needs is there ("full"); in the bucket, whose files these are, what belongs beside the checkpoint, and who
    # goes on from it
    shared: dict[str, FileEntry] = Field(default_factory=dict)
    kind: str = "full"
    lease_epoch: int = Field(default=0, ge=0)
    beside: dict[str, FileEntry] = Field(default_factory=dict)
    claimed_by: int = Field(default=0, ge=0)

    @property
    def bytes(self) -> int:
        return sum(entry.size for entry in self.files.values())

    def holds_the_same(self, other: "Seal") -> bool:
        """Whether both stand for the same content, whoever published it."""
        return (self.files, self.shared, self.kind) == (other.files, other.shared, other.kind)


def file_entry(path: Path, heed: Callable[[int], object] = lambda size: None) -> FileEntry:
    """Size and SHA-256 of one file. `heed` is called with the size of each block; what it raises ends the reading."""
    digest = hashlib.sha256()
    size = 0
    block = memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            heed(count)
            digest.update(block[:count])
            size += count
    return FileEntry(size=size, sha256=digest.hexdigest())


def seal_folder(folder: Path) -> Seal:
    """Write the manifest of a folder, hidden files left out, and return it. Raises `InputError` where it is empty."""
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    names = [name for name in names if name != MANIFEST]
    if not names:
        raise InputError("the folder has no files", where=str(folder), fix="name a folder with a model or a data set")
    with ThreadPoolExecutor() as pool:
        entries = dict(zip(names, pool.map(lambda name: file_entry(folder / name), names), strict=True))
    seal = Seal(files=entries)
    write_text(folder / MANIFEST, json.dumps({"format_version": 1, **seal.model_dump()}, indent=1) + "\n")
    return seal


def parse_seal(data: bytes, where: str) -> Seal:
    """The files that a manifest names. Raises `IntegrityError` where it is none, or names what no folder may hold."""
    try:
        seal = Seal.model_validate(json.loads(data))
        for name in (*seal.files, *seal.shared, *seal.beside):
            check_key(name)
    except (ValidationError, ValueError, RecursionError, InputError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise IntegrityError(f"{MANIFEST} is malformed: {reason}", where=where) from None
    if not seal.files:
        raise IntegrityError(f"{MANIFEST} names no files", where=where)
    return seal


def verify_folder(folder: Path) -> Seal:
    """The seal of a local folder, after every file's size and SHA-256 were found right; so were the shared ones.

    Raises `IntegrityError` at the first that is not, `ObjectNotFound` where the folder has no manifest.
    """
    where = str(folder)
    try:
        seal = parse_seal((folder / MANIFEST).read_bytes(), where)
    except OSError as error:
        raise ObjectNotFound(f"{MANIFEST} cannot be read: {error.strerror}", where=where) from None
    check_files(folder, seal.files)
    if seal.shared:
        blobs = {blob_name(entry.sha256): entry for entry in seal.shared.values()}
        check_files(folder.parent / SHARED, blobs)
    return seal


def check_files(folder: Path, files: Mapping[str, FileEntry]) -> None:
    """Read every file and compare size and SHA-256. Raises `IntegrityError` at the first that is not right."""
    check_each([(folder, name, entry) for name, entry in files.items()])


def check_each(
    files: Sequence[tuple[Path, str, FileEntry]], entry_of: Callable[[Path], FileEntry] = file_entry
) -> None:
    """As `check_files`, for files (folder, name, what it should be) of several folders; two are read at once.

    `entry_of` reads a file, in one of several threads; what it raises, unless that is an `OSError`, is raised.
    """
    for folder, name, entry in files:  # a missing one is found out before gigabytes are read
        with _reading(folder, name):
            found = safe_path(folder, name).stat().st_size
        if found != entry.size:
            raise IntegrityError(f"{name} has {found} bytes instead of {entry.size}", where=str(folder))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda file: _check_digest(file, entry_of), files))


def _check_digest(file: tuple[Path, str, FileEntry], entry_of: Callable[[Path], FileEntry]) -> None:
    folder, name, entry = file
    with _reading(folder, name):
        same = entry_of(folder / name).sha256 == entry.sha256
    if not same:
        raise IntegrityError(f"{name} was changed: its SHA-256 differs", where=str(folder))


@contextmanager
def _reading(folder: Path, name: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise IntegrityError(f"{name} is missing", where=str(folder)) from None
    except OSError as error:
        raise IntegrityError(f"{name} cannot be read: {error.strerror}", where=str(folder)) from None
