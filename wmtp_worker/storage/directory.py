"""A folder that is used as a bucket: a network disk, a mounted volume, or the tests' quickest server.

Objects are plain files under their keys. What is being written lies in the hidden folder `.tmp-store` at the bucket's
root, on the same file system, and is renamed when it is whole and synced. Writers take one lock file, shared for
unconditional writes and alone for `if_version`; readers take none. A version is modification time, size and inode.
SHA-256 is not recorded: `head` computes it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import stat
import threading
import time
import uuid
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from wmtp_worker.errors import InputError, PreconditionFailed, SettingsError, TransientError
from wmtp_worker.settings.schema import CloudSettings
from wmtp_worker.storage.atomic import TEMPORARY_PREFIX, fsync_path
from wmtp_worker.storage.directory_errors import MISSING, no_bucket, translate, vanished
from wmtp_worker.storage.directory_listing import Listing, info_of, is_hidden
from wmtp_worker.storage.directory_upload import DirectoryUpload, Staged, sweep
from wmtp_worker.storage.keys import check_copy, check_key, check_path
from wmtp_worker.storage.objects import ObjectInfo

if TYPE_CHECKING:
    from typing_extensions import Buffer

STAGING = TEMPORARY_PREFIX + "store"
LOCK = TEMPORARY_PREFIX + "lock"
_DIGESTS_KEPT = 4096
# for the lock file: it is held for less than a millisecond, but whoever holds it may be stopped
_LOCK_SECONDS = 10.0
_LOCK_PAUSE = 0.005


def open_store(cloud: CloudSettings) -> DirectoryStore:
    """The folder `cloud.bucket`, which the first write makes if only its last part is missing. Touches no file.

    Raises `SettingsError`.
    """
    if cloud.bucket is None:
        fix = "set CLOUD_BUCKET to a folder, or CLOUD_PROVIDER to s3, gcs or azure"
        raise SettingsError("no bucket is set", where="cloud.bucket", fix=fix)
    # a link to the bucket is as good as the bucket; one out of it is not
    bucket = Path(os.path.realpath(Path(cloud.bucket).expanduser()))
    root = Path(os.path.realpath(bucket / cloud.prefix))
    if not root.is_relative_to(bucket):
        what = f"cloud.prefix={cloud.prefix!r} is a link that leaves {bucket}"
        raise SettingsError(what, where=str(root), fix="set CLOUD_BUCKET to that folder, or replace the link")
    return DirectoryStore(bucket, root, cloud.prefix)


class DirectoryStore:
    """`ObjectStore` over a folder of this machine. Safe for several threads, processes and, with a shared disk whose
    file system keeps flock and rename, machines."""

    def __init__(self, bucket: Path, root: Path, prefix: str) -> None:
        self._bucket = bucket
        self._root = root
        self._prefix = f"{prefix}/" if prefix else ""
        self._digests: OrderedDict[tuple[str, str], str] = OrderedDict()
        self._digests_lock = threading.Lock()
        self._uploads: weakref.WeakSet[DirectoryUpload] = weakref.WeakSet()
        # how the bucket is known again: by its lock file, or else as the folder it was at first
        self._has_lock = False
        self._first_seen: tuple[int, int] | None = None

    @property
    def url(self) -> str:
        """The folder's path."""
        return str(self._root)

    def __repr__(self) -> str:
        return f"DirectoryStore({self.url!r})"

    def head(self, key: str) -> ObjectInfo:
        """See `ObjectStore`. Reads the whole file, unless this store has computed its digest before."""
        check_key(key, self._where("head", key))
        with self._errors("head", key), self._open("head", key) as descriptor:
            info = info_of(key, os.fstat(descriptor))
            known = (key, info.version)
            digest = self._digests.get(known)
            if digest is None:
                with open(descriptor, "rb", closefd=False) as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                self._remember(known, digest)
            return replace(info, sha256=digest)

    def list(self, prefix: str = "", after: str = "") -> Iterator[ObjectInfo]:
        """See `ObjectStore`. Memory grows with the largest folder only. Links to folders are not followed."""
        folder, _, beginning = prefix.rpartition("/")
        parts = folder.split("/") if folder else []
        with self._errors("list", prefix):
            if not self._is_there("list", prefix):
                return
            start = self._root.joinpath(*parts)
            plain = not any(part in ("", ".", "..") or is_hidden(part) for part in parts)
            if plain and os.path.realpath(start) == str(start):
                listing = Listing(after, self._inside, lambda: self._is_there("list", prefix))
                yield from listing.walk(start, f"{folder}/" if folder else "", beginning)
                self._is_there("list", prefix)

    def get(
        self, key: str, start: int = 0, length: int | None = None, version: str | None = None
    ) -> tuple[ObjectInfo, Buffer]:
        """See `ObjectStore`."""
        check_key(key, self._where("get", key))
        with self._errors("get", key), self._open("get", key) as descriptor:
            info = info_of(key, os.fstat(descriptor))
            if version is not None and info.version != version:
                raise self._changed("get", key)
            rest = max(0, info.size - start)
            wanted = rest if length is None else min(length, rest)
            data = bytearray(wanted)
            view, done = memoryview(data), 0
            while done < wanted and (count := os.preadv(descriptor, [view[done:]], start + done)):
                done += count
            if done < wanted:
                raise TransientError(f"the file ended after {start + done} bytes", where=self._where("get", key))
            return info, data

    def put(
        self,
        key: str,
        data: Buffer,
        *,
        if_absent: bool = False,
        if_version: str | None = None,
        sha256: str | None = None,
    ) -> ObjectInfo:
        """See `ObjectStore`. When it returns, the file and its name are on the disk."""
        check_key(key, self._where("put", key))
        with self._errors("put", key):
            staged = self._stage(key)
            try:
                with open(staged, "xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                info = self._publish("put", staged, key, if_absent=if_absent, if_version=if_version)
            finally:
                staged.unlink(missing_ok=True)
            digest = sha256 or hashlib.sha256(data).hexdigest()
            self._remember((key, info.version), digest)
            return replace(info, sha256=digest)

    def begin(
        self, key: str, size: int, sha256: str, part_size: int, token: Mapping[str, str] | None
    ) -> DirectoryUpload:
        """See `ObjectStore`. The unfinished file's name comes from key, content and part size: no token is needed."""
        check_key(key, self._where("begin", key))
        self._path(key, "begin")
        identity = hashlib.sha256(f"{self._prefix}{key}\n{sha256}\n{part_size}\n{size}".encode()).hexdigest()

        def publish(staged: Path) -> ObjectInfo:
            with self._errors("finish", key):
                info = self._publish("finish", staged, key)
                self._remember((key, info.version), sha256)
                return replace(info, sha256=sha256)

        with self._errors("begin", key):
            staged = Staged.open(self._staging(), identity[:40], self._prefix + key)
        upload = DirectoryUpload(staged, size, part_size, publish, lambda: self._errors("put part of", key))
        self._uploads.add(upload)
        return upload

    def copy(self, source: str, target: str) -> None:
        """See `ObjectStore`."""
        check_copy(source, target, self._where("copy", target))
        with self._errors("copy", source), self._open("copy", source) as descriptor:
            staged = self._stage(target)
            try:
                with open(descriptor, "rb", closefd=False) as old, open(staged, "xb") as new:
                    shutil.copyfileobj(old, new, 1 << 20)
                    new.flush()
                    os.fsync(new.fileno())
                self._publish("copy", staged, target)
            finally:
                staged.unlink(missing_ok=True)

    def delete(self, key: str, *, if_version: str | None = None) -> None:
        """See `ObjectStore`. Folders that become empty go too."""
        with self._errors("delete", key):
            path = self._path(key, "delete")
            if not self._is_there("delete", key):
                return
            with self._lock(alone=if_version is not None):
                if if_version is not None and self._version(path) not in (None, if_version):
                    raise self._changed("delete", key)
                with suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
                    path.unlink()
            for folder in path.parents:
                if folder == self._root or not self._inside(str(folder)):
                    break
                try:
                    folder.rmdir()
                except OSError:
                    break

    def sweep(self, prefix: str, older_than: timedelta) -> int:
        """See `ObjectStore`. What a killed `put` left is removed too, and not counted."""
        with self._errors("sweep", prefix):
            if not self._is_there("sweep", prefix):
                return 0
            return sweep(self._bucket / STAGING, self._prefix + prefix, time.time() - older_than.total_seconds())

    def close(self) -> None:
        """Unfinished uploads stay on the disk, for another store to go on with."""
        for upload in list(self._uploads):
            upload.close()

    # --- files ---

    @contextmanager
    def _open(self, operation: str, key: str) -> Iterator[int]:
        path = os.path.realpath(self._path(key, operation))
        if not self._inside(path):
            where = self._where(operation, key)
            raise InputError(f"{key!r} is a link that leaves {self._bucket}", where=where, fix="replace the link")
        # a pipe would block
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            yield descriptor
        finally:
            os.close(descriptor)

    def _path(self, key: str, operation: str) -> Path:
        """The file of a key. Its folder, links resolved, is within the bucket."""
        where = self._where(operation, key)
        check_path(key, where, ("", ".", ".."))
        if any(map(is_hidden, key.split("/"))):
            fix = f"names that begin with {TEMPORARY_PREFIX} are for files that are being written"
            raise InputError(f"the key {key!r} has a hidden part", where=where, fix=fix)
        path = self._root / key
        if not self._inside(os.path.realpath(path.parent)):
            raise InputError(f"a folder of {key!r} is a link that leaves {self._bucket}", where=where, fix="remove it")
        return path

    def _inside(self, path: str) -> bool:
        return path == str(self._bucket) or path.startswith(f"{self._bucket}/".replace("//", "/"))

    def _staging(self) -> Path:
        if not self._is_there("write to", ""):
            self._bucket.mkdir(exist_ok=True)
        folder = self._bucket / STAGING
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder

    def _stage(self, key: str) -> Path:
        self._path(key, "put")
        return self._staging() / uuid.uuid4().hex

    def _publish(
        self, operation: str, staged: Path, key: str, *, if_absent: bool = False, if_version: str | None = None
    ) -> ObjectInfo:
        """Give a finished file its name; atomic and durable."""
        path = self._path(key, operation)
        if path.is_dir():
            fix = "give the file another name; a folder cannot hold both"
            raise InputError(f"{key!r} is a folder", where=self._where(operation, key), fix=fix)
        with self._lock(alone=if_version is not None):
            if if_version is not None and self._version(path) != if_version:
                raise self._changed(operation, key)
            # inodes are used again at once and clocks are coarse: our own time makes each version another
            now = time.time_ns()
            os.utime(staged, ns=(now, now))
            info = replace(info_of(key, os.stat(staged)), modified=None)  # it gets its time with its name
            self._rename(operation, staged, path, key, exclusive=if_absent)
        # whoever deletes it at once may take its folder too
        with suppress(FileNotFoundError):
            fsync_path(path.parent)
        return info

    def _rename(self, operation: str, staged: Path, path: Path, key: str, *, exclusive: bool) -> None:
        while True:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                if exclusive:
                    os.link(staged, path)
                else:
                    staged.replace(path)
                return
            except (FileExistsError, NotADirectoryError, FileNotFoundError):
                if exclusive and os.path.lexists(path):
                    raise self._changed(operation, key) from None
                if any(os.path.lexists(folder) and not folder.is_dir() for folder in path.parents):
                    fix = "give the file another name; a file cannot be a folder too"
                    what = f"a part of {key!r} is a file already"
                    raise InputError(what, where=self._where(operation, key), fix=fix) from None
                # else a delete took the empty folder away in between
                if not staged.exists():
                    raise

    @contextmanager
    def _lock(self, *, alone: bool) -> Iterator[None]:
        descriptor = os.open(self._staging().with_name(LOCK), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            self._take(descriptor, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            yield
        finally:
            os.close(descriptor)

    def _take(self, descriptor: int, kind: int) -> None:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    fix = "see whether a process that writes there is stopped, and end it"
                    raise TransientError(f"{LOCK} stays locked", where=str(self._bucket), fix=fix) from None
            time.sleep(_LOCK_PAUSE)

    def _version(self, path: Path) -> str | None:
        try:
            return info_of("", os.stat(path)).version
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _remember(self, known: tuple[str, str], digest: str) -> None:
        with self._digests_lock:
            self._digests[known] = digest
            while len(self._digests) > _DIGESTS_KEPT:
                self._digests.popitem(last=False)

    # --- errors ---

    def _where(self, operation: str, key: str) -> str:
        return f"{operation} {self.url}/{key}" if key else f"{operation} {self.url}"

    def _changed(self, operation: str, key: str) -> PreconditionFailed:
        return PreconditionFailed("somebody else changed the object first", where=self._where(operation, key))

    def _is_there(self, operation: str, key: str) -> bool:
        """Whether there is such a folder; where there is none yet, the first write makes it.

        Raises `BucketNotFound` where it could not be made, and where it was there before, also if another one is in
        its place now: a disk that is unmounted leaves an empty folder.
        """
        # looked at first: another thread may be writing for the first time
        had_lock, first_seen = self._has_lock, self._first_seen
        if _status(self._bucket / LOCK) is not None:
            self._has_lock = True
            return True
        status = _status(self._bucket)
        is_folder = status is not None and stat.S_ISDIR(status.st_mode)
        now = (status.st_dev, status.st_ino) if status is not None and is_folder else None
        if had_lock or first_seen not in (None, now):
            raise vanished(self._bucket, self._where(operation, key))
        if now is None and (status is not None or not self._bucket.parent.is_dir()):
            raise no_bucket(self._bucket, self._where(operation, key))
        self._first_seen = now or first_seen
        return now is not None

    @contextmanager
    def _errors(self, operation: str, key: str) -> Iterator[None]:
        try:
            try:
                yield
            except OSError as error:
                if error.errno in MISSING:
                    self._is_there(operation, key)  # or it is the bucket that is missing
                raise
        except OSError as error:
            raise translate(error, self._where(operation, key), self._bucket) from error


def _status(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
