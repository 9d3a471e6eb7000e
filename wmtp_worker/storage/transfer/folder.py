"""A whole folder to a prefix, back, or compared with it: the plan is carried out while it is made."""

import functools
import itertools
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path

from wmtp_worker.errors import InputError, IntegrityError, ObjectNotFound, PreconditionFailed, WorkerError
from wmtp_worker.storage.atomic import disk_errors
from wmtp_worker.storage.objects import ObjectInfo
from wmtp_worker.storage.transfer.compare import differs, recorded_digest
from wmtp_worker.storage.transfer.digest import hash_file
from wmtp_worker.storage.transfer.download import STAGING, download_large, download_small, place_of
from wmtp_worker.storage.transfer.limits import Heed
from wmtp_worker.storage.transfer.locks import try_lock
from wmtp_worker.storage.transfer.means import Means
from wmtp_worker.storage.transfer.partial import remove
from wmtp_worker.storage.transfer.paths import check_key, reading, safe_path, selector, shown
from wmtp_worker.storage.transfer.plan import Local, Pair, join, listing, walk
from wmtp_worker.storage.transfer.pool import Group, Pool
from wmtp_worker.storage.transfer.report import Action, Kind, Report
from wmtp_worker.storage.transfer.upload import upload_large, upload_small

# concern one file; the others go on
_ONE_FILE = (InputError, IntegrityError, ObjectNotFound, PreconditionFailed)


class _Folder(ABC):
    """What push, pull and verify have in common: join both sides, decide, carry out, report."""

    # who takes a file that cannot be seen for one that is gone deletes its only copy
    deletes_objects = False

    def __init__(
        self,
        means: Means,
        large: Pool,
        check: Heed,
        folder: Path,
        prefix: str,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        delete: bool = False,
        dry_run: bool = False,
    ) -> None:
        prefix = prefix.strip("/")
        self.means = means
        self.folder = folder
        self.prefix = f"{prefix}/" if prefix else ""
        self.report = Report()
        self._large = large
        self._check = check
        self._wanted = selector(include, exclude)
        self._delete = delete
        self._dry_run = dry_run

    def run(self, avoid: Path) -> Report:
        """Do it all; `avoid` is a folder whose files do not count. Raises what concerns more than one file."""
        started = time.monotonic()
        self.means.progress.start(None)
        try:
            with Group(self.means.requests, self._check) as group:
                self.group = group
                with closing(self._pairs(avoid)) as pairs:
                    for pair in pairs:
                        self.decide(pair)
                self.conclude()
        finally:
            self.report.seconds = time.monotonic() - started
            self.means.progress.finish()
            self.means.journal.flush()
        return self.report

    @abstractmethod
    def decide(self, pair: Pair) -> None:
        """Say what has to be done about one path, and do it here or `later`."""

    def conclude(self) -> None:  # noqa: B027  # most have nothing left to do
        """What is left to do once the plan is complete."""

    def act(self, kind: Kind, key: str, size: int, action: Callable[[], int | None]) -> None:
        """Plan an action and run it here and now; it returns the bytes that travelled, if it moves a file."""
        self.report.plan(Action(kind, key, size), listed=self._dry_run)
        if self._dry_run:
            return
        try:
            sent = action()
        except _ONE_FILE as error:
            self.report.fail(key, error)
        else:
            self.report.did(kind, sent)

    def settle(self, local: Local, remote: ObjectInfo, size: int, carry: Callable[[], None]) -> None:
        """Carry a file of `size` that is on both sides, if it differs; where that takes reading, the pool finds out."""
        known = differs(self.means, local, remote)
        if known is False:
            self.report.skip()
        elif known is None:
            self.later(size, functools.partial(self._carry_if_different, local, remote, carry))
        else:
            self.later(size, carry)

    def _carry_if_different(self, local: Local, remote: ObjectInfo, carry: Callable[[], None]) -> None:
        try:
            different = differs(self.means, local, remote, self.group.heed)
        except _ONE_FILE as error:
            self.report.fail(local.key, error)
            return
        carry() if different else self.report.skip()

    def later(self, size: int, task: Callable[[], None]) -> None:
        """Run `task` in the pool for files of this size."""
        self.group.submit(task, self._large if size > self.means.part_size else None)

    def _pairs(self, avoid: Path) -> Generator[Pair]:
        remotes = listing(self.means.store.list(self.prefix), self.prefix, self._wanted)
        strict = self._delete and self.deletes_objects
        with closing(walk(self.folder, self._wanted, avoid, strict=strict)) as locals_:
            for number, pair in enumerate(join(locals_, remotes)):
                if not number % 64:
                    self._check()
                    self.group.heed()
                yield pair


class Push(_Folder):
    """From the folder to the bucket. Nothing is deleted before the whole folder was seen and all is uploaded."""

    deletes_objects = True

    def run(self, avoid: Path) -> Report:
        self._surplus: dict[str, ObjectInfo] = {}
        return super().run(avoid)

    def decide(self, pair: Pair) -> None:
        local, remote = pair.local, pair.remote
        if local is None:
            if self._delete and remote is not None:
                if self._dry_run:
                    self._remove(pair.key, remote)
                else:
                    self._surplus[pair.key] = remote
            return
        if self._surplus:
            self._make_way(local.key)
        upload = functools.partial(self._upload, local)
        if remote is None:
            self.later(local.stamp.size, upload)
        else:
            self.settle(local, remote, local.stamp.size, upload)

    def _upload(self, local: Local) -> None:
        def upload() -> int:
            check_key(local.key)
            way = upload_large if local.stamp.size > self.means.part_size else upload_small
            return way(self.means, local.path, self.prefix + local.key, None, self.group.heed)[1]

        self.act("upload", local.key, local.stamp.size, upload)

    def conclude(self) -> None:
        if self._surplus:
            self.group.wait()
        for key, remote in self._surplus.items():
            self.later(0, functools.partial(self._remove, key, remote))

    def _make_way(self, key: str) -> None:
        """Remove an object in whose place there is a folder now: a store of files cannot have both."""
        while key := key.rpartition("/")[0]:
            if remote := self._surplus.pop(key, None):
                self._remove(key, remote)

    def _remove(self, key: str, remote: ObjectInfo) -> None:
        self.act("delete", key, remote.size, lambda: self.means.store.delete(remote.key))


class Pull(_Folder):
    """From the bucket to the folder."""

    def run(self, avoid: Path) -> Report:
        self._numbers = itertools.count()
        self._made: set[str] = set()
        self._emptied: set[Path] = set()
        self._staging = self.folder / STAGING
        self._base = f"{self.folder}/"
        if self._dry_run:
            return super().run(avoid)
        self._sweep()
        try:
            report = super().run(avoid)
            self._remove_empty()
        finally:
            self._sweep()
        if not report.failed:
            self._sweep_beginnings()
        return report

    def decide(self, pair: Pair) -> None:
        local, remote = pair.local, pair.remote
        if remote is None:
            if self._delete and local is not None:
                self.act("delete", pair.key, local.stamp.size, functools.partial(self._remove, local))
            return
        download = functools.partial(self._download, pair.key, remote)
        if local is None:
            self.later(remote.size, download)
        else:
            self.settle(local, remote, remote.size, download)

    def _download(self, key: str, info: ObjectInfo) -> None:
        self.act("download", key, info.size, functools.partial(self._fetch, key, info))

    def _fetch(self, key: str, info: ObjectInfo) -> int:
        path = self._target(key)
        if info.size > self.means.part_size:
            place = place_of(self._staging, key)
            return download_large(self.means, info, Path(path), place, None, self.group.heed, durable=False)[1]
        temporary = f"{self._base}{STAGING}/p-{next(self._numbers)}"
        return download_small(self.means, info, path, temporary, None, self.group.heed, durable=False)[1]

    def _target(self, key: str) -> str:
        """The path for a key, its folders made. Folders once found to be folders are not looked at again."""
        parent, _, _ = key.rpartition("/")
        if parent in self._made:
            check_key(key)
            if os.path.islink(self._base + key):
                safe_path(self.folder, key)  # says so
        else:
            folder = safe_path(self.folder, key).parent
            with disk_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
            self._made.add(parent)
        return self._base + key

    def _remove(self, local: Local) -> None:
        with disk_errors(local.path.parent):
            local.path.unlink(missing_ok=True)
        self._emptied.add(local.path.parent)

    def _remove_empty(self) -> None:
        """Only when nobody downloads into them any more."""
        for folder in self._emptied:
            while folder != self.folder:
                try:
                    folder.rmdir()
                except OSError:
                    break
                folder = folder.parent

    def _sweep(self) -> None:
        """Remove what an earlier, killed pull left; only called while no other one can be at it."""
        for path in self._staging.glob("p-*"):
            path.unlink(missing_ok=True)

    def _sweep_beginnings(self) -> None:
        """Remove what killed downloads left, unless somebody is at it again."""
        for place in {path.with_suffix("") for path in self._staging.glob("*.*")}:
            with try_lock(place.with_name(f"{place.name}.lock")) as free:
                if free:
                    remove(place)


class Verify(_Folder):
    """Compare by content; changes nothing."""

    def decide(self, pair: Pair) -> None:
        local, remote = pair.local, pair.remote
        self.report.plan(Action("verify", pair.key, local.stamp.size if local else 0))
        if remote is None:
            self._differs(pair.key, "is not in the bucket")
        elif local is None:
            self._differs(pair.key, "is missing in the folder")
        elif local.stamp.size != remote.size:
            self._differs(pair.key, f"has {local.stamp.size} bytes, the object {remote.size}")
        else:
            # in the pool of large files: whoever reads an object in parts waits for the other pool
            self.later(local.stamp.size, functools.partial(self._compare, local, remote))

    def _compare(self, local: Local, remote: ObjectInfo) -> None:
        try:
            kind, wanted = recorded_digest(self.means, remote, self.group.heed)
            with reading(local.path):
                found = hash_file(local.path, self.group.heed, kind=kind)
        except _ONE_FILE as error:
            self.report.fail(local.key, error)
            return
        self.means.progress.advance(local.stamp.size, 1)
        if found == wanted:
            self.report.did("verify")
        else:
            self._differs(local.key, f"has another {kind.upper()} than the object")

    def _differs(self, key: str, what: str) -> None:
        error: WorkerError = IntegrityError(
            f"{shown(key)} {what}",
            where=shown(f"verify {self.means.store.url}/{self.prefix}{key}"),
            fix="push or pull it again",
        )
        self.report.fail(key, error)
