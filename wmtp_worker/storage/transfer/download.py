"""One object to one file: never visible before it is whole and its digest was checked."""

import functools
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from wmtp_worker.errors import IntegrityError, PreconditionFailed, TransientError
from wmtp_worker.storage.atomic import TEMPORARY_PREFIX, disk_errors, publish
from wmtp_worker.storage.objects import ObjectInfo
from wmtp_worker.storage.transfer.digest import InOrderDigest, hash_descriptor
from wmtp_worker.storage.transfer.journal import Stamp
from wmtp_worker.storage.transfer.limits import Heed
from wmtp_worker.storage.transfer.locks import file_lock
from wmtp_worker.storage.transfer.means import Means, Sent, can_go_on
from wmtp_worker.storage.transfer.partial import Partial
from wmtp_worker.storage.transfer.paths import shown
from wmtp_worker.storage.transfer.pool import Group

if TYPE_CHECKING:
    from typing_extensions import Buffer

# hidden folder in the target's folder: partial downloads, temporaries and locks
STAGING = f"{TEMPORARY_PREFIX}pull"
_ARRIVALS = 3


def place_of(staging: Path, relative: str) -> Path:
    """Where a download to `relative` keeps its temporaries: the same for every process, however long the name."""
    return staging / hashlib.sha256(relative.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def download_small(
    means: Means, info: ObjectInfo, path: str, temporary: str, expected: str | None, heed: Heed, *, durable: bool
) -> tuple[ObjectInfo, int]:
    """Get an object by one request and check it. Returns the object and its size.

    Atomic: `path` is the old file or the whole new one. An arrival with a wrong digest is tried again; then
    `IntegrityError`. An object that changed since `info` is taken as it is now.
    """
    changed = False
    for _ in range(_ARRIVALS):
        with means.memory.hold(info.size, heed):
            means.bandwidth.take(info.size, heed)
            try:
                found, data = means.store.get(info.key, version=info.version)
            except PreconditionFailed:
                if changed:
                    raise
                info, changed = means.store.head(info.key), True
                continue
            digest = hashlib.sha256(data).hexdigest()
            if _arrived(found, data, digest, expected or found.sha256 or info.sha256, found.md5 or info.md5):
                heed()
                _write(path, temporary, data, digest, means, durable=durable)
                means.journal.note_object(info.key, found.version, digest)
                means.progress.advance(found.size, 1)
                return found, found.size
    raise _damaged(means, info, expected)


def download_large(
    means: Means, info: ObjectInfo, path: Path, place: Path, expected: str | None, check: Heed, *, durable: bool
) -> tuple[ObjectInfo, int]:
    """Get an object in parts, in parallel, into a hidden file that a later process can go on with. As `download_small`.

    Returns the object and the bytes that travelled. Must not be called from a thread of the request pool.
    """
    with file_lock(place.with_name(f"{place.name}.lock"), check):
        if info.sha256 is None:
            info = means.store.head(info.key)
        sent = Sent()
        changed = damaged = False
        while True:
            if expected is not None and info.sha256 not in (None, expected):
                raise _damaged(means, info, expected)
            if is_there(means, info, path, expected, check):
                means.progress.advance(info.size, 1)
                return info, 0
            try:
                if _fill(means, info, path, place, expected, check, sent, durable=durable):
                    return info, sent.total
                if damaged:
                    raise _damaged(means, info, expected)
                damaged = True
            except PreconditionFailed:
                if changed:
                    raise
                info, changed = means.store.head(info.key), True


def is_there(means: Means, info: ObjectInfo, path: Path, expected: str | None, heed: Heed) -> bool:
    """Whether the file at `path` has the content of the object already, as far as that is recorded."""
    digest = expected or info.sha256 or means.journal.object_digest(info.key, info.version)
    kind = "sha256" if digest else "md5"
    digest = digest or info.md5
    if digest is None:
        return False
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        stamp = Stamp.of(os.fstat(descriptor))
        if stamp.size != info.size:
            return False
        found = means.journal.file_digest(path, stamp) if kind == "sha256" else None
        if found is None:
            found = hash_descriptor(descriptor, stamp.size, heed, kind=kind)
            if kind == "sha256" and Stamp.of(os.fstat(descriptor)) == stamp:
                means.journal.note_file(path, stamp, found)
        return found == digest
    finally:
        os.close(descriptor)


def _fill(
    means: Means,
    info: ObjectInfo,
    path: Path,
    place: Path,
    expected: str | None,
    check: Heed,
    sent: Sent,
    *,
    durable: bool,
) -> bool:
    """Fetch what is missing and publish the file; False, and nothing left, where its digest is wrong."""
    partial = Partial(place, means.store.url, info, means.part_size)
    with _kept_if_useful(partial), Group(means.requests, check) as group:
        group.at_last(partial.close)
        digest = InOrderDigest(partial.descriptor, info.size, means.part_size, group.heed)

        def fetch(number: int) -> None:
            group.heed()
            start = number * means.part_size
            length = min(means.part_size, info.size - start)
            if partial.has(number):
                digest.add(number, None)
            else:
                # what comes in pieces is copied into one, and allocators keep about as much as they have given out
                with means.memory.hold(2 * length, group.heed):
                    means.bandwidth.take(length, group.heed)
                    data = _part(means, info, start, length)
                    group.heed()
                    partial.write(number, data)
                    sent.add(length)
                    digest.add(number, data)
            means.progress.advance(length)

        for number in range(partial.count):
            group.submit(functools.partial(fetch, number))
        group.wait()
        right = _is_right(means, info, digest.hexdigest(), expected, partial, check)
        if right:
            stamp = Stamp.of(partial.publish(path, durable=durable))
            means.journal.note_file(path, stamp, digest.hexdigest(), ours=True)
            means.journal.note_object(info.key, info.version, digest.hexdigest())
            means.progress.advance(0, 1)
        else:
            partial.remove()
    return right


@contextmanager
def _kept_if_useful(partial: Partial) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if not can_go_on(error):
            partial.remove()
        raise


def _part(means: Means, info: ObjectInfo, start: int, length: int) -> "Buffer":
    _, data = means.store.get(info.key, start, length, info.version)
    if memoryview(data).nbytes != length:
        raise TransientError(
            f"{memoryview(data).nbytes} bytes came instead of {length}",
            where=shown(f"get {means.store.url}/{info.key}"),
        )
    return data


def _is_right(means: Means, info: ObjectInfo, digest: str, expected: str | None, partial: Partial, check: Heed) -> bool:
    recorded = expected or info.sha256
    if recorded is None and info.md5 is not None:
        return hash_descriptor(partial.descriptor, info.size, check, kind="md5") == info.md5
    return recorded in (None, digest)


def _arrived(info: ObjectInfo, data: "Buffer", digest: str, sha256: str | None, md5: str | None) -> bool:
    if memoryview(data).nbytes != info.size:
        return False
    if sha256 is None and md5 is not None:
        return hashlib.md5(data, usedforsecurity=False).hexdigest() == md5
    return sha256 in (None, digest)


def _write(path: str, temporary: str, data: "Buffer", digest: str, means: Means, *, durable: bool) -> None:
    try:
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                written, size = 0, memoryview(data).nbytes
                while written < size:
                    written += os.write(descriptor, memoryview(data)[written:] if written else data)
                if durable:
                    os.fsync(descriptor)
                    publish(Path(temporary), Path(path))
                else:
                    os.replace(temporary, path)
                stamp = Stamp.of(os.fstat(descriptor))  # a rename counts as a change, too
            finally:
                os.close(descriptor)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
    except OSError:
        with disk_errors(Path(path).parent):
            raise
    means.journal.note_file(path, stamp, digest, ours=True)


def _damaged(means: Means, info: ObjectInfo, expected: str | None) -> IntegrityError:
    wanted = expected or info.sha256 or info.md5
    return IntegrityError(
        f"what arrives is not the content whose digest is {wanted}",
        where=shown(f"get {means.store.url}/{info.key}"),
        fix="upload the object again from a good copy",
    )
