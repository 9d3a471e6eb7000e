"""`CloudSync`: models, data, checkpoints and logs between work directory and bucket, for people and for runs."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from wmtp_worker.errors import (
    AGAIN,
    CheckpointError,
    InputError,
    RunHeldError,
    SettingsError,
    StorageError,
    WorkerError,
)
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
# kept of the time to close: what the next worker need not wait for a lease to run out is worth more than one more part
_RELEASE_SECONDS = 2.0
_NOT_SAFE = (StorageError, InputError, CheckpointError, RunHeldError, OSError)


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
    """What `sync_checkpoints` did: the step it fetched, those it published, and what failed, by name.

    `behind`: a step in the bucket that is newer than all in the work directory, so nothing was published.
    """

    fetched: int | None = None
    behind: int | None = None
    published: list[int] = field(default_factory=list)
    failed: dict[str, Exception] = field(default_factory=dict)

    @property
    def not_safe(self) -> dict[str, str]:
        """Why what is not safe is not, by name."""
        return {name: str(error) for name, error in self.failed.items()}


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
        self._logs = cloud.logs
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
        return RunSync(self.transfer, RunPaths(self.workdir, name), check=self._poll, logs=self._logs)

    def hold(
        self,
        side: RunSync,
        status: Callable[[], Mapping[str, Any]] | None = None,
        taken: Callable[[], object] = lambda: None,
    ) -> Lease | None:
        """Take the lease of a run, and keep it until `close`; None where the terms are to have none.

        The caller must hold the run's lock in the work directory. What `status` returns is put into the bucket's
        `heartbeat.json`; `taken` is called before that, when the run is ours, and must not raise. Raises as
        `Lease.acquire` does; without leases `SettingsError` where others use them.
        """
        if not self.terms.lease:
            if read_lease(self.store, side.keys.lease) is not None:
                raise SettingsError(
                    "checkpoint.lease is false, and this run is trained under leases",
                    where=f"{self.store.url}/{side.keys.lease}",
                    fix="set checkpoint.lease=true; or, if no worker trains this run, delete that object",
                )
            taken()
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
        taken()
        lease.start(status)
        side.hold(lease)
        return lease

    def let_go(self, lease: Lease) -> None:
        """Let others have the run at once, and end the lease's thread."""
        lease.release()
        if lease.close():
            self._leases.remove(lease)

    def sync_checkpoints(self, run: str, keep_last: int | None = None, *, keep_every: int = 0) -> Synced:
        """Bring both sides to the newest checkpoint that verifies (the table in `storage.runs`), exports included.

        Publishes the local steps that are newer than the bucket's, `final.pt` and `best_model.pt`; with `keep_last`
        older published steps are deleted afterwards, multiples of `keep_every` left out. Nothing is done while a worker
        trains the run, here or elsewhere: that is not safe then.
        """
        result, side = Synced(), self.run(run)

        def work(lease: Lease | None) -> None:
            result.fetched = side.fetch_checkpoint("auto")
            side.drop_beginnings()
            self._publish_newer(side, lease, result)
            if keep_last is not None and result.published:
                self._try("pruning", lambda: side.prune(keep_last, max(result.published), keep_every), result)

        if not self.here:
            self._as_holder(side, work, result)
        return result

    def push_run(self, run: str) -> Synced:
        """Publish what is only in the work directory, logs too, unless the bucket has a newer checkpoint.

        Raises, after all else was tried, what no later try would heal: `RunHeldError`, `AccessDenied`,
        `BucketNotFound`, and `IntegrityError` or `InputError` for a local checkpoint that is damaged.
        """
        result, side = Synced(), self.run(run)

        def work(lease: Lease | None) -> None:
            self._publish_newer(side, lease, result)
            if not result.failed and result.behind is None:
                self._try("logs", side.publish_logs, result)

        self._as_holder(side, work, result)
        for error in result.failed.values():
            if isinstance(error, WorkerError) and error.exit_code != AGAIN:
                raise error
        return result

    def _as_holder(self, side: RunSync, work: Callable[[Lease | None], object], result: Synced) -> None:
        """Do something as the one who holds the run, here and in the bucket; where that fails, nothing is safe."""
        try:
            with run_lock(side.paths.lock):
                lease = self.hold(side)
                try:
                    work(lease)
                finally:
                    if lease is not None:
                        self.let_go(lease)
        except _NOT_SAFE as error:
            log.warning("the checkpoints of %s stay where they are: %s", side.paths.run, error)
            names = [step_name(step) for step in side.paths.steps()]
            result.failed |= dict.fromkeys(names or [f"run {side.paths.run}"], error)

    def _publish_newer(self, side: RunSync, lease: Lease | None, result: Synced) -> None:
        newest, here = max(side.published_steps(), default=-1), side.paths.steps()
        if newest > max(here, default=-1):
            log.warning("%s is in the bucket, and newer than all that is here: nothing is published", step_name(newest))
            result.behind = newest
            return
        later = [step for step in here if step > newest]
        if later and lease is not None:
            lease.began(max(newest, 0))
        for step in later:
            if self._try(step_name(step), lambda step=step: side.publish(step), result):  # type: ignore[misc]
                result.published.append(step)
        for path in (side.paths.best, side.paths.final):
            if path.exists():
                self._try(path.name, lambda path=path: side.publish_file(path), result)  # type: ignore[misc]

    def sync_logs(self, run: str) -> bool:
        """Upload what is new in the run's logs; whether all of it is in the bucket now."""
        return self.here or self._try("logs", self.run(run).publish_logs, Synced())

    def _try(self, name: str, work: Callable[[], object], result: Synced) -> bool:
        try:
            work()
        except _NOT_SAFE as error:
            log.warning("%s is not in the bucket, kept locally: %s", name, error)
            result.failed[name] = error
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

        A little of the time is kept for letting others have the run. `tick` is called about once a second meanwhile,
        and may raise to end the waiting.
        """
        if self._background is None:
            self._give_back()
            return {}
        background, self._background = self._background, None
        seconds = self._close_seconds if seconds is None else seconds
        release = min(_RELEASE_SECONDS, seconds / 4) if self._leases else 0.0
        try:
            return background.close(seconds - release, tick)
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
