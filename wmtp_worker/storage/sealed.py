"""Sealed folders on their way: in a bucket one appears by the conditional put of its manifest, locally by a rename."""

import functools
import hashlib
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from wmtp_worker.errors import DiskFullError, IntegrityError, ObjectNotFound, PreconditionFailed, TransientError
from wmtp_worker.storage.atomic import PARTIAL_PREFIX, disk_errors, fsync_path, publish
from wmtp_worker.storage.layout import MANIFEST
from wmtp_worker.storage.objects import ObjectInfo, ObjectStore
from wmtp_worker.storage.seal import FileEntry, Seal, parse_seal
from wmtp_worker.storage.transfer import Transfer
from wmtp_worker.storage.transfer.paths import safe_path
from wmtp_worker.storage.transfer.pool import Group, Pool

T = TypeVar("T")

_FILES_AT_ONCE = 8
_LARGEST_MANIFEST = 64 << 20


def read_seal(store: ObjectStore, prefix: str) -> tuple[Seal, ObjectInfo, bytes] | None:
    """The manifest under `prefix` (which ends in `/`), its version and its bytes; None where there is none.

    Raises `IntegrityError` where it is malformed, or larger than any manifest.
    """
    where = f"{store.url}/{prefix}{MANIFEST}"
    try:
        info, data = store.get(prefix + MANIFEST, 0, _LARGEST_MANIFEST)
    except ObjectNotFound:
        return None
    if info.size > _LARGEST_MANIFEST:
        raise IntegrityError(f"{MANIFEST} has {info.size} bytes: it is none", where=where)
    content = bytes(data)
    return parse_seal(content, where), info, content


def push_sealed(transfer: Transfer, folder: Path, prefix: str, *, replace: bool = False) -> bool:
    """Publish a sealed local folder under `prefix`: files first, the manifest last, by a conditional put.

    Returns whether anything had to be sent. Files that are there already with the right digest are not sent again, and
    objects that the manifest does not name are removed. Another folder under the same prefix is taken back first with
    `replace`, else `PreconditionFailed` is raised (`IntegrityError` where its manifest cannot be read). A crash at any
    point leaves no manifest, or that of a whole folder; files that somebody else changed meanwhile take ours back.
    """
    store = transfer.store
    data = (folder / MANIFEST).read_bytes()
    seal = parse_seal(data, str(folder))
    there = _listed(store, prefix)
    manifest = there.pop(prefix + MANIFEST, None)
    if manifest is not None and not _publishes(store, prefix, seal, replace) and not replace:
        fix = "choose another name, or delete it there"
        raise PreconditionFailed(
            "something else is published under the same name", where=f"{store.url}/{prefix}", fix=fix
        )
    differing = [name for name, entry in seal.files.items() if not is_same(store, there.get(prefix + name), entry)]
    surplus = there.keys() - {prefix + name for name in seal.files}
    if manifest is not None:
        if not differing and not surplus and _publishes(store, prefix, seal, replace):
            return False
        store.delete(prefix + MANIFEST, if_version=manifest.version)

    def send(name: str) -> None:
        transfer.upload_file(safe_path(folder, name), prefix + name, sha256=seal.files[name].sha256)

    each(send, differing)
    for key in surplus:
        store.delete(key)
    published = store.put(prefix + MANIFEST, data, if_absent=True)
    if not is_complete(seal, _listed(store, prefix), prefix):
        store.delete(prefix + MANIFEST, if_version=published.version)
        what = "files were removed or changed by somebody else while they were published"
        raise TransientError(what, where=f"{store.url}/{prefix}", fix="see that one worker alone trains this run")
    return True


def _listed(store: ObjectStore, prefix: str) -> dict[str, ObjectInfo]:
    """Everything under the prefix, but for the markers by which consoles show empty folders."""
    return {info.key: info for info in store.list(prefix) if not info.key.endswith("/")}


def _publishes(store: ObjectStore, prefix: str, seal: Seal, replace: bool) -> bool:
    """Whether the bucket's manifest names the same files; one that cannot be read may be replaced."""
    try:
        published = read_seal(store, prefix)
    except IntegrityError as error:
        if replace:
            return False
        raise IntegrityError(error.what, where=error.where, fix="delete it there, and publish again") from None
    return published is not None and published[0] == seal


def is_same(store: ObjectStore, info: ObjectInfo | None, entry: FileEntry) -> bool:
    """Whether an object, as a listing has it, is what a manifest says by size and recorded digest."""
    return info is not None and info.size == entry.size and (info.sha256 or store.head(info.key).sha256) == entry.sha256


def is_complete(seal: Seal, there: Mapping[str, ObjectInfo], prefix: str) -> bool:
    """Whether a listing has every file of the seal, in its size."""
    return all(prefix + name in there and there[prefix + name].size == entry.size for name, entry in seal.files.items())


def pull_sealed(
    transfer: Transfer,
    prefix: str,
    folder: Path,
    *,
    accept: Callable[[bytes], object] = lambda manifest: None,
    before: Callable[[], object] = lambda: None,
) -> Seal:
    """Download the sealed folder under `prefix` to `folder`, which must not exist yet.

    Atomic: it appears by one rename, when every file has the SHA-256 of the manifest and is on the disk. `accept` sees
    the manifest first and may raise; `before` is called when all is there, just before the rename. What was killed goes
    on where it was: the beginnings lie beside `folder`, hidden. Raises `ObjectNotFound` where there is no manifest,
    `IntegrityError` where a file is missing or is not what the manifest says, `DiskFullError`.
    """
    store = transfer.store
    published = read_seal(store, prefix)
    if published is None:
        raise ObjectNotFound(f"no {MANIFEST}", where=f"{store.url}/{prefix}")
    seal, _, data = published
    accept(data)
    fetch_folder(transfer, {name: prefix + name for name in seal.files}, seal, data, folder, before)
    return seal


def fetch_folder(
    transfer: Transfer,
    keys: Mapping[str, str],
    seal: Seal,
    manifest: bytes,
    folder: Path,
    before: Callable[[], object] = lambda: None,
) -> None:
    """Download the files of a seal, name to key, and make `folder` of them and the manifest; see `pull_sealed`."""
    building = _building(folder, manifest)
    begun = sum(path.stat().st_blocks * 512 for path in building.rglob("*") if path.is_file())
    check_room(building, seal.bytes - begun)
    fetch_files(transfer, {safe_path(building, name): (key, seal.files[name]) for name, key in keys.items()})
    with disk_errors(folder.parent):
        (building / MANIFEST).write_bytes(manifest)
        fsync_path(building / MANIFEST)
        fsync_path(building)
    before()
    with disk_errors(folder.parent):
        publish(building, folder)


def fetch_files(transfer: Transfer, files: Mapping[Path, tuple[str, FileEntry]]) -> None:
    """Download several files, each path with its key and what must be in it.

    Each appears whole or not at all. Raises `IntegrityError` where one is missing or differs.
    """

    def fetch(path: Path) -> None:
        key, entry = files[path]
        try:
            transfer.download_file(key, path, sha256=entry.sha256)
        except ObjectNotFound as error:
            raise IntegrityError(f"{path.name} is missing", where=f"{transfer.store.url}/{key}") from error

    each(fetch, files)


def _building(folder: Path, manifest: bytes) -> Path:
    """The hidden folder in which `folder` comes into being: named after the manifest, so beginnings of others go."""
    digest = hashlib.sha256(manifest).hexdigest()[:12]
    building = folder.with_name(f"{PARTIAL_PREFIX}{folder.name}-{digest}")
    ours = re.compile(re.escape(f"{PARTIAL_PREFIX}{folder.name}-") + "[0-9a-f]{12}")
    with disk_errors(folder.parent):
        building.mkdir(parents=True, exist_ok=True)
        for old in folder.parent.iterdir():
            if old != building and ours.fullmatch(old.name):
                shutil.rmtree(old, ignore_errors=True)
    return building


def check_room(folder: Path, needed: int) -> None:
    """Raise `DiskFullError` unless that many bytes are free where the folder is."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DiskFullError(
            f"{needed / 1e6:,.1f} MB are to be downloaded, {free / 1e6:,.1f} MB are free",
            where=str(folder.parent),
            fix="free some space, or set WMTP_WORKDIR to a larger disk",
        )


def each(job: Callable[[T], None], names: Iterable[T]) -> None:
    """Run `job` for every name, several at once. After an error no further one begins; it is raised at the end.

    One that hangs in the network is left behind after a few seconds, and does not keep the process.
    """
    pool = Pool(_FILES_AT_ONCE, "sealed")
    try:
        with Group(pool, lambda: None) as group:
            for name in names:
                group.submit(functools.partial(job, name))
    finally:
        pool.close()
