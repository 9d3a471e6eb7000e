"""`CloudSync`: models, data, checkpoints and logs between work directory and bucket, for people and for runs."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from wmtp_worker.errors import InputError, RunHeldError, SettingsError, StorageError
from wmtp_worker.settings import CheckpointSettings, CloudSettings, load
from wmtp_worker.storage.background import Background
from wmtp_worker.storage.layout import RunPaths, step_name
from wmtp_worker.storage.lease import Lease
from wmtp_worker.storage.lease_file import read_lease, workdir_id
from wmtp_worker.storage.objects import ObjectInfo
from wmtp_worker.storage.open import open_store
from wmtp_worker.storage.runlock import run_lock
from wmtp_worker.storage.runs import RunSync
from wmtp_worker.storage.transfer import Report, Transfer

log = logging.getLogger(__name__)

STATE = ".sync"


@dataclass(frozen=True)
class Terms:
    """How a run in the bucket is held: see the settings `checkpoint.lease…`, times in seconds."""

    lease: bool = True
    seconds: float = 60.0
    wait: float = 0.0

    @classmethod
    def of(cls, settings: CheckpointSettings) -> Self:
        """As the settings say."""
        return cls(settings.lease, settings.lease_seconds, settings.lease_wait)


@dataclass
class Synced:
    """What `sync_checkpoints` did: the step it fetched, those it published, and why anything is not safe.

    `behind`: the bucket has a newer checkpoint than the work directory, so nothing was published.
    """

    fetched: int | None = None
    behind: bool = False
    published: list[int] = field(default_factory=list)
    not_safe: dict[str, str] = field(default_factory=dict)


def is_here(cloud: CloudSettings, workdir: Path) -> bool:
    """Whether the work directory itself is all the bucket there is."""
    if cloud.provider != "local":
        return False
    return cloud.bucket is None or os.path.realpath(Path(cloud.bucket, cloud.prefix)) == os.path.realpath(workdir)


class CloudSync:
    """One bucket and one work directory that mirrors it (see `storage.layout`). A context manager; thread-safe.

    The methods that carry one thing raise `StorageError`, `IntegrityError` and `DiskFullError`. `sync_checkpoints` and
    `sync_logs` never fail because of the bucket: they warn, keep the work locally, and say what is not safe.

    With `cloud.provider=local` and no bucket the work directory is all there is: what is uploaded goes to its place
    there, and runs have nothing to sync.
    """

    def __init__(
        self,
        cloud: CloudSettings,
        workdir: Path,
        check: Callable[[], None] = lambda: None,
        terms: Terms = Terms(),
    ) -> None:
        """Opens the bucket without asking it anything yet. `check` is polled during transfers and may raise."""
        self.workdir = workdir
        self.terms = terms
        self._leases: list[Lease] = []
        self.check = check
        self.here = is_here(cloud, workdir)
        if self.here:
            workdir.mkdir(parents=True, exist_ok=True)
            cloud = cloud.model_copy(update={"bucket": str(workdir), "prefix": ""})
        self.store = open_store(cloud, check=self._poll)
        self.transfer = Transfer(
            self.store,
            workdir / STATE,
            concurrency=cloud.concurrency,
            memory=cloud.memory << 20,
            bandwidth=cloud.bandwidth * 1e6,
            check=self._poll,
        )
        self._close_seconds = cloud.close_seconds
        self._background: Background | None = None

    def _poll(self) -> None:
        self.check()

    # --- one thing at a time -------------------------------------------------------------------------------

    def upload_file(self, path: Path | str, key: str) -> ObjectInfo:
        """Upload one file. Atomic: readers of the bucket see the old object or the whole new one."""
        return self.transfer.upload_file(Path(path), key)

    def download_file(self, key: str, path: Path | str) -> ObjectInfo:
        """Download one object. Atomic: `path` is the old file or the whole new one, with the recorded SHA-256."""
        return self.transfer.download_file(key, Path(path))

    def upload_directory(
        self,
        folder: Path | str,
        prefix: str,
        *,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        delete: bool = False,
        dry_run: bool = False,
    ) -> Report:
        """Upload what differs, by size and digest; `delete` removes objects that have no file. Each file is atomic."""
        return self.transfer.push(
            Path(folder), prefix, include=include, exclude=exclude, delete=delete, dry_run=dry_run
        )

    def download_directory(
        self,
        prefix: str,
        folder: Path | str,
        *,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        delete: bool = False,
        dry_run: bool = False,
    ) -> Report:
        """Download what differs, by size and digest; `delete` removes files without object. Each file is atomic."""
        return self.transfer.pull(
            prefix, Path(folder), include=include, exclude=exclude, delete=delete, dry_run=dry_run
        )

    # --- a run -----------------------------------------------------------------------------------------------

    def run(self, name: str) -> RunSync:
        """The checkpoints and logs of one run."""
        return RunSync(self.transfer, RunPaths(self.workdir, name))

    def hold(self, side: RunSync, status: Callable[[], Mapping[str, Any]] | None = None) -> Lease | None:
        """Take the lease of a run, and keep it until `close`; None where the terms are to have none.

        The caller must hold the run's lock in the work directory. What `status` returns is put into the bucket's
        `heartbeat.json`. Raises as `Lease.acquire` does; without leases `SettingsError` where others use them.
        """
        if not self.terms.lease:
            if read_lease(self.store, side.keys.lease) is not None:
                raise SettingsError(
                    "checkpoint.lease is false, and this run is trained under leases",
                    where=f"{self.store.url}/{side.keys.lease}",
                    fix="set checkpoint.lease=true; or, if no worker trains this run, delete that object",
                )
            return None
        lease = Lease.acquire(
            self.store,
            side.keys,
            seconds=self.terms.seconds,
            wait=self.terms.wait,
            workdir_id=workdir_id(self.workdir / STATE),
            check=self._poll,
        )
        self._leases.append(lease)
        lease.start(status)
        side.hold(lease)
        return lease

    def let_go(self, lease: Lease) -> None:
        """Let others have the run at once, and end the lease's thread."""
        lease.release()
        if lease.close():
            self._leases.remove(lease)

    def sync_checkpoints(
        self, run: str, keep_last: int | None = None, *, keep_every: int = 0, fetch: bool = True
    ) -> Synced:
        """Bring both sides to the newest checkpoint that verifies (the table in `storage.runs`), exports included.

        Publishes the local steps that are newer than the bucket's, `final.pt` and `best_model.pt`; with `keep_last`
        older published steps are deleted afterwards, multiples of `keep_every` left out. Without `fetch` nothing is
        downloaded. Nothing is done while a worker trains the run, here or elsewhere: that is not safe then.
        """
        result, side = Synced(), self.run(run)
        if self.here:
            return result
        try:
            with run_lock(side.paths.lock):
                lease = self.hold(side)
                try:
                    self._sync_checkpoints(side, lease, keep_last, keep_every, fetch, result)
                finally:
                    if lease is not None:
                        self.let_go(lease)
        except (StorageError, InputError, RunHeldError) as error:
            log.warning("the checkpoints of %s stay where they are: %s", run, error)
            result.not_safe |= {step_name(step): str(error) for step in side.paths.steps()}
        return result

    def _sync_checkpoints(
        self, side: RunSync, lease: Lease | None, keep_last: int | None, keep_every: int, fetch: bool, result: Synced
    ) -> None:
        if fetch:
            result.fetched = side.fetch_checkpoint("auto")
        newest = max(side.published_steps(), default=-1)
        if newest > max(side.paths.steps(), default=-1):
            log.warning("%s is in the bucket, and newer than all that is here: nothing is published", step_name(newest))
            result.behind = True
            return
        later = [step for step in side.paths.steps() if step > newest]
        if later and lease is not None:
            lease.began(max(newest, 0))
        for step in later:
            if self._try(step_name(step), lambda step=step: side.publish(step), result):  # type: ignore[misc]
                result.published.append(step)
        for path in (side.paths.best, side.paths.final):
            if path.exists():
                self._try(path.name, lambda path=path: side.publish_file(path), result)  # type: ignore[misc]
        if keep_last is not None and result.published:
            self._try("pruning", lambda: side.prune(keep_last, max(result.published), keep_every), result)

    def push_run(self, run: str) -> Synced:
        """Publish what is only in the work directory, logs too, unless the bucket has a newer checkpoint."""
        result = self.sync_checkpoints(run, fetch=False)
        if not result.not_safe and not result.behind:
            self._try("logs", self.run(run).publish_logs, result)
        return result

    def sync_logs(self, run: str) -> bool:
        """Upload what is new in the run's logs; whether all of it is in the bucket now."""
        return self.here or self._try("logs", self.run(run).publish_logs, Synced())

    def _try(self, name: str, work: Callable[[], object], result: Synced) -> bool:
        try:
            work()
        except (StorageError, InputError, RunHeldError, OSError) as error:
            log.warning("%s is not in the bucket, kept locally: %s", name, error)
            result.not_safe[name] = str(error)
            return False
        return True

    # --- behind the training ---------------------------------------------------------------------------------

    @property
    def background(self) -> Background:
        """The queue of uploads, begun when first asked for."""
        if self._background is None:
            self._background = Background()
            # what asks the training to stop must not stop the uploads of what it saved
            self.check = self._background.check
        return self._background

    @property
    def pending(self) -> Mapping[str, str]:
        """Name to reason of what was queued and is not safe yet."""
        return self._background.pending if self._background is not None else {}

    def close(self, seconds: float | None = None, tick: Callable[[], None] = lambda: None) -> dict[str, str]:
        """Finish the queued uploads within `seconds` (cloud.close_seconds), give everything back; what is not safe.

        `tick` is called about once a second meanwhile, and may raise to end the waiting.
        """
        if self._background is None:
            self._give_back()
            return {}
        background, self._background = self._background, None
        try:
            return background.close(self._close_seconds if seconds is None else seconds, tick)
        finally:
            # one that hangs in the network would only be waited for again; what it may still send, it sends as holder
            if background.stuck:
                for lease in self._leases:
                    lease.close()
            else:
                self._give_back()

    def _give_back(self) -> None:
        for lease in list(self._leases):
            self.let_go(lease)
        if self._leases:
            return  # its thread hangs in the network, and uses the store
        self.transfer.close()
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(0 if error is not None else None)


def get_cloud_sync_from_env() -> CloudSync:
    """A `CloudSync` for `CLOUD_PROVIDER`, `CLOUD_BUCKET`, `CLOUD_PREFIX`, … and `WMTP_WORKDIR`, `.env` included.

    Raises `SettingsError`. The bucket is not asked anything yet.
    """
    settings = load()
    return CloudSync(settings.cloud, settings.run.workdir, terms=Terms.of(settings.checkpoint))
