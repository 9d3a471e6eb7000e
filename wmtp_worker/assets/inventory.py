"""Which models and data sets there are, in the work directory and in the bucket, and whether they are whole."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from wmtp_worker.assets.fetch import PUSHING
from wmtp_worker.errors import IntegrityError, ObjectNotFound, PreconditionFailed
from wmtp_worker.storage.layout import ASSET_KINDS, MANIFEST, AssetKind, asset_dir, asset_prefix
from wmtp_worker.storage.objects import ObjectStore
from wmtp_worker.storage.seal import FileEntry, verify_folder
from wmtp_worker.storage.sealed import read_seal

_BLOCK = 8 << 20

Status = Literal["verified", "damaged", "not recorded", "not there"]


@dataclass
class Holding:
    """What one side has of one asset, sizes in bytes."""

    files: int = 0
    bytes: int = 0
    recorded: bool = False
    unfinished: bool = False

    def add(self, name: str, size: int) -> None:
        if name == MANIFEST:
            self.recorded = True
        elif name == PUSHING:
            self.unfinished = True
        elif name:
            self.files, self.bytes = self.files + 1, self.bytes + size


@dataclass
class Item:
    """One model or data set by name; None: that side does not have it."""

    kind: AssetKind
    name: str
    local: Holding | None = None
    bucket: Holding | None = None


@dataclass(frozen=True)
class Finding:
    """What a look at one side of one asset found: `problem` says what is damaged."""

    place: str
    status: Status
    files: int = 0
    bytes: int = 0
    problem: str | None = field(default=None)


def list_assets(workdir: Path, store: ObjectStore | None) -> list[Item]:
    """Every model and data set of both sides, by kind and name. No file is read."""
    items: dict[tuple[AssetKind, str], Item] = {}
    for kind in ASSET_KINDS:
        for name, holding in _local(workdir / kind):
            items.setdefault((kind, name), Item(kind, name)).local = holding
        for info in store.list(f"{kind}/") if store is not None else ():
            name, slash, file = info.key.removeprefix(f"{kind}/").partition("/")
            if name and slash:
                item = items.setdefault((kind, name), Item(kind, name))
                item.bucket = item.bucket or Holding()
                item.bucket.add(file, info.size)
    return [items[key] for key in sorted(items)]


def _local(root: Path) -> Iterator[tuple[str, Holding]]:
    for folder in root.iterdir() if root.is_dir() else ():
        if folder.name.startswith(".") or not folder.is_dir():
            continue
        holding = Holding()
        for path in folder.rglob("*"):
            if path.is_file():
                holding.add(path.relative_to(folder).as_posix(), path.stat().st_size)
        yield folder.name, holding


def verify_local(folder: Path | None, workdir: Path, kind: AssetKind, name: str) -> Finding:
    """Read every file of a local folder and compare it with the digests of its manifest."""
    if folder is None:
        return Finding(str(asset_dir(workdir, kind, name)), "not there")
    place = str(folder)
    try:
        seal = verify_folder(folder)
    except ObjectNotFound:
        return Finding(place, "not recorded")
    except IntegrityError as error:
        return Finding(place, "damaged", problem=error.what)
    return Finding(place, "verified", len(seal.files), seal.bytes)


def verify_bucket(
    store: ObjectStore, kind: AssetKind, name: str, check: Callable[[], None], *, read: bool = False
) -> Finding:
    """Compare the objects of a folder with the digests of its manifest.

    The digest that was recorded with each object is taken for that of its bytes, unless there is none or `read` is
    asked for: then the bytes are fetched. Raises the store's errors.
    """
    prefix = asset_prefix(kind, name)
    place = f"{store.url}/{prefix}"
    try:
        published = read_seal(store, prefix)
        if published is None:
            there = next(store.list(prefix), None) is not None
            return Finding(place, "not recorded" if there else "not there")
        for file, entry in published[0].files.items():
            check()
            if problem := _problem(store, prefix + file, entry, check, read):
                return Finding(place, "damaged", problem=f"{file} {problem}")
    except IntegrityError as error:
        return Finding(place, "damaged", problem=error.what)
    return Finding(place, "verified", len(published[0].files), published[0].bytes)


def _problem(store: ObjectStore, key: str, entry: FileEntry, check: Callable[[], None], read: bool) -> str | None:
    try:
        info = store.head(key)
        if info.size != entry.size:
            return f"has {info.size} bytes instead of {entry.size}"
        digest = info.sha256
        if read or digest is None:
            digest = _digest(store, key, info.size, info.version, check)
    except ObjectNotFound:
        return "is missing"
    except PreconditionFailed:
        return "was changed while it was read"
    return None if digest == entry.sha256 else "has another SHA-256"


def _digest(store: ObjectStore, key: str, size: int, version: str, check: Callable[[], None]) -> str:
    total = hashlib.sha256()
    for start in range(0, size, _BLOCK):
        check()
        total.update(store.get(key, start, min(_BLOCK, size - start), version)[1])
    return total.hexdigest()
