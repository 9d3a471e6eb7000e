"""`Transfer`: single files and whole folders, to a bucket and back."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from wmtp_worker.errors import InputError, StorageError
from wmtp_worker.storage.atomic import disk_errors
from wmtp_worker.storage.objects import ObjectInfo, ObjectStore
from wmtp_worker.storage.transfer.download import STAGING, download_large, download_small, is_there, place_of
from wmtp_worker.storage.transfer.folder import Pull, Push, Verify
from wmtp_worker.storage.transfer.journal import Journal
from wmtp_worker.storage.transfer.limits import Bandwidth, MemoryBudget
from wmtp_worker.storage.transfer.locks import file_lock
from wmtp_worker.storage.transfer.means import Means
from wmtp_worker.storage.transfer.partial import SMALL
from wmtp_worker.storage.transfer.paths import is_same_place, reading, shown
from wmtp_worker.storage.transfer.pool import Pool
from wmtp_worker.storage.transfer.progress import Progress, Silent
from wmtp_worker.storage.transfer.report import Report
from wmtp_worker.storage.transfer.upload import upload_large, upload_small

LOG = logging.getLogger(__name__)
_MIB = 1 << 20
PART_SIZE = 8 * _MIB
# large files that are on their way at once; each has its parts in flight together
_LARGE_AT_ONCE = 4


class Transfer:
    """Carries files between a folder and a store, checked by SHA-256 on both ways. A context manager.

    `state` is a private folder for the journal, which other processes may share. `concurrency` is the most requests at
    once; as many are made as the distance of the server asks for. `memory` (bytes) bounds what is in flight,
    `bandwidth` (bytes a second, 0: none) is an average of some seconds. `check` is polled in the calling thread and may
    raise to stop a transfer; nothing torn is left then. All methods may be called from several threads. The store
    should try again what is transient (`RetryingStore`).
    """

    def __init__(
        self,
        store: ObjectStore,
        state: Path,
        *,
        concurrency: int = 64,
        memory: int = 128 * _MIB,
        bandwidth: float = 0,
        check: Callable[[], None] = lambda: None,
        progress: Progress | None = None,
        part_size: int = PART_SIZE,
    ) -> None:
        self._check = check
        self._closed = False
        self._state = state
        self._large = Pool(min(_LARGE_AT_ONCE, concurrency), "transfer-large")
        self._means = Means(
            store=store,
            journal=Journal(state, store.url),
            memory=MemoryBudget(memory),
            bandwidth=Bandwidth(bandwidth),
            progress=progress or Silent(),
            requests=Pool(concurrency, "transfer"),
            part_size=part_size,
        )

    @property
    def store(self) -> ObjectStore:
        """The store it works with."""
        return self._means.store

    def upload_file(self, path: Path, key: str, *, sha256: str | None = None) -> ObjectInfo:
        """Make the object `key` of a file. Atomic; a killed upload of a large file goes on where it was.

        `sha256` is the digest the file must have. Raises `InputError` where the file cannot be read or does not hold
        still, `IntegrityError` where it has another digest. A file that only grows is taken as it was at first.
        """
        self._begin()
        with reading(path):
            size = path.stat().st_size
        if not path.is_file():
            raise InputError(f"{shown(str(path))} is no regular file", fix="name a file")
        progress = self._means.progress
        progress.start(size)
        try:
            if size <= self._means.part_size:
                info, _ = upload_small(self._means, path, key, sha256, self._check)
            else:
                info, _ = upload_large(self._means, path, key, sha256, self._check)
        finally:
            progress.finish()
            self._means.journal.flush()
        return info

    def begun(self, sha256: str) -> list[str]:
        """The keys to which large uploads of this content were begun here and not finished: `upload_file` goes on."""
        self._begin()
        return self._means.journal.uploads(sha256)

    def download_file(self, key: str, path: Path, *, sha256: str | None = None) -> ObjectInfo:
        """Make the file `path` of an object, or leave it if it has that content already. Atomic and durable.

        Checked against `sha256`, else the digest recorded with the object, else its MD5, else its size. Of several
        processes that download to one path one does it. An interrupted download goes on where it was; its parts wait
        in a hidden folder beside the target. Raises `ObjectNotFound`, `IntegrityError`, `DiskFullError`.
        """
        self._begin()
        means, path = self._means, path.absolute()
        info = means.store.head(key)
        means.progress.start(info.size)
        place = place_of(path.parent / STAGING, path.name)
        try:
            if info.size > means.part_size:
                info, _ = download_large(means, info, path, place, sha256, self._check, durable=True)
                return info
            with file_lock(place.with_name(f"{place.name}.lock"), self._check):
                if not is_there(means, info, path, sha256, self._check):
                    temporary = place.with_name(f"{place.name}{SMALL}")
                    info, _ = download_small(means, info, str(path), str(temporary), sha256, self._check, durable=True)
                return info
        finally:
            means.progress.finish()
            means.journal.flush()

    def push(
        self,
        folder: Path,
        prefix: str = "",
        *,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        delete: bool = False,
        dry_run: bool = False,
    ) -> Report:
        """Make the objects under `prefix` those of the folder: what differs by size or digest is uploaded.

        `delete` also removes objects that are not in the folder (and take part: see `include`, `exclude`). Trouble with
        one file is in the report's `failed`; trouble with the bucket, the network or the disk is raised. Nothing is
        deleted where the folder, or one in it, vanishes meanwhile: that is an error. So are a folder and a bucket of
        which one lies in the other; where both are the same folder nothing is done.
        """
        self._begin(dry_run)
        if not folder.is_dir():
            raise InputError(f"there is no folder {shown(str(folder))}", fix="name a folder that exists")
        if self._is_same(folder, prefix):
            return Report()
        work = Push(self._means, self._large, self._check, folder, prefix, include, exclude, delete, dry_run)
        return work.run(avoid=self._state)

    def pull(
        self,
        prefix: str,
        folder: Path,
        *,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        delete: bool = False,
        dry_run: bool = False,
    ) -> Report:
        """Make the folder what is under `prefix`: what differs by size or digest is downloaded. See `push`.

        Each file appears whole or not at all. Files are not forced to the disk one by one: after a crash of the machine
        itself (not of the process) some may be lost. One process at a time pulls into a folder; another one waits.
        """
        self._begin(dry_run)
        folder = folder.absolute()
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{shown(str(folder))} is no folder", fix="name a folder")
        if self._is_same(folder, prefix):
            return Report()
        work = Pull(self._means, self._large, self._check, folder, prefix, include, exclude, delete, dry_run)
        if dry_run:
            return work.run(avoid=self._state)
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with file_lock(folder / STAGING / "lock", self._check):
            return work.run(avoid=self._state)

    def verify(self, prefix: str, folder: Path) -> Report:
        """Read all files of the folder and compare their digests with those of the objects.

        What differs, or is on one side only, is in the report's `failed`. An object without a recorded digest is read.
        """
        self._begin()
        if not folder.is_dir():
            raise InputError(f"there is no folder {shown(str(folder))}", fix="name a folder that exists")
        if self._is_same(folder, prefix):
            raise InputError("both sides are the same folder", where=shown(str(folder)), fix="verify a copy")
        return Verify(self._means, self._large, self._check, folder, prefix).run(avoid=self._state)

    def close(self) -> None:
        """End the threads and close the journal; the store stays open. Nothing can be transferred afterwards."""
        self._closed = True
        self._large.close()
        self._means.requests.close()
        self._means.journal.close()

    def _begin(self, dry_run: bool = False) -> None:
        if self._closed:
            raise StorageError("nothing can be transferred any more: it was closed", fix="make another Transfer")
        self._means.journal.open(make=not dry_run)

    def _is_same(self, folder: Path, prefix: str) -> bool:
        same = is_same_place(folder, self._means.store.url, prefix)
        if same:
            LOG.info("nothing is transferred: %s is the same folder on both sides", shown(str(folder)))
        return same

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
