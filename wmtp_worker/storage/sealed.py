"""Sealed folders on their way: in a bucket one appears by the conditional put of its manifest, locally by a rename."""

import hashlib
import re
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from wmtp_worker.errors import DiskFullError, IntegrityError, ObjectNotFound, PreconditionFailed
from wmtp_worker.storage.atomic import PARTIAL_PREFIX, disk_errors, fsync_path, publish
from wmtp_worker.storage.layout import MANIFEST
from wmtp_worker.storage.objects import ObjectInfo, ObjectStore
from wmtp_worker.storage.seal import Seal, parse_seal
from wmtp_worker.storage.transfer import Transfer
from wmtp_worker.storage.transfer.paths import safe_path

_FILES_AT_ONCE = 8


def read_seal(store: ObjectStore, prefix: str) -> tuple[Seal, ObjectInfo, bytes] | None:
    """The manifest under `prefix` (which ends in `/`), its version and its bytes; None where there is none."""
    try:
        info, data = store.get(prefix + MANIFEST)
    except ObjectNotFound:
        return None
    content = bytes(data)
    return parse_seal(content, f"{store.url}/{prefix}{MANIFEST}"), info, content


def push_sealed(transfer: Transfer, folder: Path, prefix: str, *, replace: bool = False) -> bool:
    """Publish a sealed local folder under `prefix`: files first, the manifest last, by a conditional put.

    Returns whether anything had to be sent. Files that are there already with the right digest are not sent again, and
    objects that the manifest does not name are removed. Another folder under the same prefix is taken back first with
    `replace`, else `PreconditionFailed` is raised. A crash at any point leaves no manifest, or that of a whole folder.
    """
    store = transfer.store
    data = (folder / MANIFEST).read_bytes()
    seal = parse_seal(data, str(folder))
    there = {info.key: info for info in store.list(prefix)}
    if (manifest := there.pop(prefix + MANIFEST, None)) is not None:
        published = read_seal(store, prefix)
        if published is not None and published[0] == seal and _complete(seal, there, prefix):
            return False
        if not replace:
            raise PreconditionFailed(
                "something else is published under the same name",
                where=f"{store.url}/{prefix}",
                fix="choose another name, or delete it there",
            )
        store.delete(prefix + MANIFEST, if_version=manifest.version)

    def send(name: str) -> None:
        entry, key = seal.files[name], prefix + name
        if key in there and there[key].size == entry.size and store.head(key).sha256 == entry.sha256:
            return
        transfer.upload_file(safe_path(folder, name), key, sha256=entry.sha256)

    _each(send, seal.files)
    for key in there.keys() - {prefix + name for name in seal.files}:
        store.delete(key)
    store.put(prefix + MANIFEST, data, if_absent=True)
    return True


def pull_sealed(transfer: Transfer, prefix: str, folder: Path) -> Seal:
    """Download the sealed folder under `prefix` to `folder`, which must not exist yet.

    Atomic: it appears by one rename, when every file has the SHA-256 of the manifest and is on the disk. What was
    killed goes on where it was: the beginnings lie beside `folder`, hidden. Raises `ObjectNotFound` where there is no
    manifest, `IntegrityError` where a file is missing or is not what the manifest says, `DiskFullError`.
    """
    store = transfer.store
    published = read_seal(store, prefix)
    if published is None:
        raise ObjectNotFound(f"no {MANIFEST}", where=f"{store.url}/{prefix}")
    seal, _, data = published
    building = _building(folder, data)
    _check_room(building, seal)

    def fetch(name: str) -> None:
        entry, path = seal.files[name], safe_path(building, name)
        try:
            transfer.download_file(prefix + name, path, sha256=entry.sha256)
        except ObjectNotFound as error:
            raise IntegrityError(f"{name} is missing", where=f"{store.url}/{prefix}") from error

    _each(fetch, seal.files)
    with disk_errors(folder.parent):
        (building / MANIFEST).write_bytes(data)
        fsync_path(building / MANIFEST)
        fsync_path(building)
        publish(building, folder)
    return seal


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


def _check_room(building: Path, seal: Seal) -> None:
    begun = sum(path.stat().st_blocks * 512 for path in building.rglob("*") if path.is_file())
    needed, free = seal.bytes - begun, shutil.disk_usage(building).free
    if needed > free:
        raise DiskFullError(
            f"{needed / 1e6:,.1f} MB are to be downloaded, {free / 1e6:,.1f} MB are free",
            where=str(building.parent),
            fix="free some space, or set WMTP_WORKDIR to a larger disk",
        )


def _complete(seal: Seal, there: dict[str, ObjectInfo], prefix: str) -> bool:
    """Whether the listing has every file of the seal, in its size."""
    return all(prefix + name in there and there[prefix + name].size == entry.size for name, entry in seal.files.items())


def _each(job: Callable[[str], None], names: Iterable[str]) -> None:
    """Run `job` for every name, several at once. After an error no further one begins; it is raised at the end."""
    with ThreadPoolExecutor(_FILES_AT_ONCE, thread_name_prefix="sealed") as pool:
        try:
            for done in [pool.submit(job, name) for name in names]:
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
