"""One file to one object: small ones by one request, large ones in parts that a later process can go on with."""

import contextlib
import functools
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from wmtp_worker.errors import InputError, IntegrityError, ObjectNotFound, StorageError, WorkerError
from wmtp_worker.storage.objects import ObjectInfo, PartUpload
from wmtp_worker.storage.transfer.digest import InOrderDigest, hash_descriptor
from wmtp_worker.storage.transfer.journal import Stamp
from wmtp_worker.storage.transfer.limits import Heed
from wmtp_worker.storage.transfer.means import Means, Sent, can_go_on
from wmtp_worker.storage.transfer.paths import reading, shown
from wmtp_worker.storage.transfer.pool import Group

_READS = 3
_READ_AGAIN_SECONDS = 0.1
_MOST_PARTS = 9000  # S3 takes 10,000
_MIB = 1 << 20
# the plan saw a file; a pipe in its place would block
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK


class _AgainError(Exception):
    """Has to be begun anew, because of `reason`."""

    def __init__(self, reason: WorkerError) -> None:
        super().__init__()
        self.reason = reason


@contextlib.contextmanager
def _anew_if_gone() -> Iterator[None]:
    """An unfinished upload that was thrown away by others, or whose parts are not what they should be."""
    try:
        yield
    except (ObjectNotFound, IntegrityError) as error:
        raise _AgainError(error) from error


def upload_small(means: Means, path: Path, key: str, expected: str | None, heed: Heed) -> tuple[ObjectInfo, int]:
    """Put a file by one request; the digest recorded is that of the bytes sent. Returns the object and bytes sent.

    What is sent is the file as it was when it was opened: it may grow meanwhile, or be replaced by a rename. Atomic, as
    `ObjectStore.put`. Raises `InputError` where the file cannot be read or does not hold still, and `IntegrityError`
    where it is not the file that `expected` is the SHA-256 of.
    """
    for attempt in range(_READS):
        if attempt:
            time.sleep(_READ_AGAIN_SECONDS)
            heed()
        with _opened(path) as descriptor:
            stamp = Stamp.of(os.fstat(descriptor))
            with means.memory.hold(stamp.size, heed):
                data = _read(path, descriptor, 0, stamp.size)
                digest = hashlib.sha256(data).hexdigest()
                if len(data) != stamp.size or not _holds_still(path, descriptor, stamp, digest, heed):
                    continue
                if expected is not None and digest != expected:
                    raise _not_expected(path, expected)
                means.bandwidth.take(len(data), heed)
                info = means.store.put(key, data, sha256=digest)
        means.journal.note_file(path, stamp, digest)
        means.journal.note_object(key, info.version, digest)
        means.progress.advance(len(data), 1)
        return info, len(data)
    raise _keeps_changing(path)


def upload_large(means: Means, path: Path, key: str, expected: str | None, check: Heed) -> tuple[ObjectInfo, int]:
    """Send a file in parts, in parallel; goes on with an unfinished upload of the same content. As `upload_small`.

    A file that is small by now goes by one request. Atomic: nothing is visible until all is there. An interruption
    leaves parts that the next attempt skips. Must not be called from a thread of the request pool, whose tasks it waits
    for.
    """
    for attempt in range(_READS):
        try:
            return _upload_parts(means, path, key, expected, check)
        except _AgainError as again:
            if attempt == _READS - 1:
                raise again.reason from again
    raise AssertionError("unreachable")


def _upload_parts(means: Means, path: Path, key: str, expected: str | None, check: Heed) -> tuple[ObjectInfo, int]:
    sent = Sent()
    with reading(path):
        descriptor = os.open(path, _FLAGS)
    with Group(means.requests, check) as group:
        group.at_last(lambda: os.close(descriptor))
        stamp = Stamp.of(os.fstat(descriptor))
        if stamp.size <= means.part_size:
            return upload_small(means, path, key, expected, check)
        known = means.journal.file_digest(path, stamp)
        if expected is not None and known not in (None, expected):
            raise _not_expected(path, expected)
        digest = known or expected or _digest(means, path, descriptor, stamp, check)
        upload = _begin(means, key, digest, stamp.size)
        # a digest that was only claimed is checked on the way
        witness = None if known or not expected else InOrderDigest(descriptor, stamp.size, upload.part_size, group.heed)
        try:
            _send_parts(means, group, upload, path, descriptor, stamp, sent, witness)
            if witness and witness.hexdigest() != digest:
                changed = Stamp.of(os.fstat(descriptor)) != stamp
                raise _AgainError(_keeps_changing(path)) if changed else _not_expected(path, digest)
            if not _holds_still(path, descriptor, stamp, digest, check):
                raise _AgainError(_keeps_changing(path))
            with _anew_if_gone():
                info = upload.finish()
        except BaseException as error:
            _give_up(means, upload, key, error)
            raise
        if Stamp.of(os.fstat(descriptor)) == stamp:
            means.journal.note_file(path, stamp, digest)
    means.journal.forget_upload(key)
    if info.sha256 not in (None, digest):
        # an unfinished upload of other content was taken up, whose digest was recorded when it began
        where = shown(f"upload {means.store.url}/{key}")
        raise _AgainError(IntegrityError(f"the object's recorded SHA-256 is {info.sha256}, not {digest}", where=where))
    means.journal.note_object(key, info.version, digest)
    means.progress.advance(0, 1)
    return info, sent.total


def _digest(means: Means, path: Path, descriptor: int, stamp: Stamp, check: Heed) -> str:
    """Digest of the file as it was opened."""
    with reading(path):
        digest = hash_descriptor(descriptor, stamp.size, check)
        now = Stamp.of(os.fstat(descriptor))
    if now == stamp:
        means.journal.note_file(path, stamp, digest)
    elif not _may_be_same(stamp, now):
        raise _AgainError(_keeps_changing(path))
    return digest


def _begin(means: Means, key: str, digest: str, size: int) -> PartUpload:
    part_size = max(means.part_size, -(-size // _MOST_PARTS // _MIB) * _MIB)
    token = means.journal.upload(key, digest)
    try:
        upload = means.store.begin(key, size, digest, part_size, token)
    except ObjectNotFound:
        if token is None:
            raise
        upload = means.store.begin(key, size, digest, part_size, None)  # it was thrown away meanwhile
    means.journal.note_upload(key, digest, upload.token)
    return upload


def _send_parts(
    means: Means,
    group: Group,
    upload: PartUpload,
    path: Path,
    descriptor: int,
    stamp: Stamp,
    sent: Sent,
    witness: InOrderDigest | None,
) -> None:
    def send(number: int) -> None:
        group.heed()
        offset = number * upload.part_size
        length = min(upload.part_size, stamp.size - offset)
        with means.memory.hold(length, group.heed):
            data = _read(path, descriptor, offset, length)
            if len(data) != length:
                raise _AgainError(_keeps_changing(path))
            if witness:
                witness.add(number, data)
            with _anew_if_gone():
                if not upload.has(number, data):
                    means.bandwidth.take(length, group.heed)
                    upload.put(number, data)
                    sent.add(length)
        means.progress.advance(length)

    for number in range(-(-stamp.size // upload.part_size)):
        group.submit(functools.partial(send, number))
        if upload.sequential:
            group.wait()
    group.wait()


def _give_up(means: Means, upload: PartUpload, key: str, error: BaseException) -> None:
    if not can_go_on(error):
        with contextlib.suppress(StorageError):
            upload.abort()
        means.journal.forget_upload(key)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    with reading(path):
        descriptor = os.open(path, _FLAGS)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _read(path: Path, descriptor: int, offset: int, size: int) -> bytes:
    """That many bytes, or what there is."""
    with reading(path):
        return os.pread(descriptor, size, offset)


def _may_be_same(then: Stamp, now: Stamp) -> bool:
    """Whether what was there `then` may still be: it grew, or all that changed is its name or a fact about it."""
    return now.size > then.size or (now.size, now.mtime_ns) == (then.size, then.mtime_ns)


def _holds_still(path: Path, descriptor: int, stamp: Stamp, digest: str, heed: Heed) -> bool:
    """Whether an open file begins with the bytes it consisted of when it had that stamp and that digest."""
    with reading(path):
        now = Stamp.of(os.fstat(descriptor))
        if now == stamp:
            return True
        return _may_be_same(stamp, now) and hash_descriptor(descriptor, stamp.size, heed) == digest


def _keeps_changing(path: Path) -> InputError:
    return InputError(
        "the file changes while it is uploaded", where=shown(str(path)), fix="upload it when nobody writes to it"
    )


def _not_expected(path: Path, expected: str) -> IntegrityError:
    return IntegrityError(
        f"the file's SHA-256 is not {expected}, which was recorded for it",
        where=shown(f"upload {path}"),
        fix="make the file anew; it was changed or damaged",
    )
