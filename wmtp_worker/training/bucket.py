"""The run's side of the bucket: what is fetched before it trains, and what is published while it does."""

import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from wmtp_worker.assets.fetch import fetch
from wmtp_worker.checkpoint.manifest import NewerFormatError, parse_manifest
from wmtp_worker.errors import CheckpointError, ExhaustedError, IntegrityError, PreconditionFailed, StorageError
from wmtp_worker.settings import Settings
from wmtp_worker.storage.cloud import CloudSync, is_here
from wmtp_worker.storage.layout import RunPaths, parse_step, step_name
from wmtp_worker.storage.runs import RunSync

log = logging.getLogger(__name__)


_GRACE_SECONDS = 3.0


class _GivenUpError(StorageError):
    """Raised in one fetch because of the error of another."""


class RunBucket:
    """Fetches and publishes one run. Where runs are kept locally only, all of it does nothing.

    Nothing here fails because the bucket is slow or away: the work stays in the work directory, is published when
    the bucket is back, and `close` says what is not safe. A bucket that is not there, or refuses, ends the run before
    it has begun (exit 78).
    """

    def __init__(
        self, settings: Settings, paths: RunPaths, check: Callable[[], None], tick: Callable[[], None] = lambda: None
    ) -> None:
        """`check` raises to stop what is fetched; `tick` is called about once a second while something is waited for.

        `url` is where the run is published, None where it is not. The bucket is not asked anything yet.
        """
        self._settings = settings
        self._paths = paths
        self._check = check
        self._tick = tick
        local = is_here(settings.cloud, paths.workdir)
        self._sync = None if local else CloudSync(settings.cloud, paths.workdir, self._poll)
        self._side = None if self._sync is None else self._sync.run(paths.run)
        self.url = None if self._side is None else f"{self._side.store.url}/{self._side.prefix}"
        # whether the bucket told what it has of this run: if not, nothing there is replaced
        self._seen = False
        self._began_at = 0
        self._failed = False

    # --- before the training ---------------------------------------------------------------------------------

    def fetch(self) -> None:
        """Bring model, data and the checkpoint to resume from into the work directory, all at once.

        Raises `AccessDenied`, `BucketNotFound`, `InputError`, `IntegrityError`, `DiskFullError`, `CheckpointError` for
        one of a newer format, and `ExhaustedError` where model, data or the wanted step is only in the bucket.
        """
        transfer = None if self._sync is None else self._sync.transfer
        started = time.perf_counter()
        self._at_once(lambda: fetch(self._settings, transfer, self._poll), self._fetch_checkpoint)
        if self._side is not None:
            log.info("the bucket is %s, looked through in %.1f s", self.url, time.perf_counter() - started)

    def _at_once(self, *jobs: Callable[[], object]) -> None:
        """Run the jobs in threads. The first error ends the others, and is raised; so is what `check` raises."""
        errors: list[BaseException] = []

        def run(job: Callable[[], object]) -> None:
            try:
                job()
            except BaseException as error:
                errors.append(error)
                self._failed = True

        # daemons: one that hangs in the network does not keep a stopped process alive
        threads = [threading.Thread(target=run, args=(job,), name="fetch", daemon=True) for job in jobs]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():
                    thread.join(1.0)
                    self._tick()
                    self._check()
        except BaseException:
            for thread in threads:
                thread.join(_GRACE_SECONDS)
            if any(thread.is_alive() for thread in threads):
                self._sync = None  # in use by what hangs: left behind
            raise
        if errors:
            raise next((error for error in errors if not isinstance(error, _GivenUpError)), errors[0])

    def _poll(self) -> None:
        self._check()
        if self._failed:
            raise _GivenUpError("given up, because something else could not be fetched")

    def _fetch_checkpoint(self) -> None:
        if self._side is None:
            return
        resume = self._settings.run.resume
        try:
            step = self._side.fetch_checkpoint(resume, self._accept)
        except ExhaustedError as error:
            if isinstance(resume, int) and resume not in self._paths.steps():
                raise
            log.warning("the bucket cannot be reached, going on with what is here: %s", error)
            return
        self._seen = True
        if step is not None:
            log.info("fetched %s from the bucket", step_name(step))

    def _accept(self, manifest: bytes, folder: str) -> None:
        """Raise `IntegrityError` unless this is the manifest of a checkpoint."""
        try:
            parse_manifest(manifest, folder, f"{self.url}{folder}")
        except NewerFormatError:
            raise
        except CheckpointError as error:
            raise IntegrityError(error.what, where=error.where) from None

    def fetch_weights(self, weights: str) -> None:
        """Bring `final`, `best` or a step's checkpoint, the tokenizer and the data, as far as they are not here."""
        fetch(self._settings, None if self._sync is None else self._sync.transfer, self._poll)
        if self._side is None:
            return
        if weights.isdecimal():
            self._side.fetch_checkpoint(int(weights), self._accept)
        elif (path := {"final": self._paths.final, "best": self._paths.best}.get(weights)) and not path.exists():
            self._side.fetch_file(path)

    def restored(self, step: int) -> None:
        """Say where the run goes on: later steps in the bucket are set aside where the user chose an earlier one."""
        self._began_at = step
        if self._side is None:
            return
        if self._settings.run.resume != "auto" and self._seen:
            try:
                if aside := self._side.set_aside_after(step):
                    log.info("set aside %s in the bucket", ", ".join(map(step_name, aside)))
            except StorageError as error:
                self._seen = False
                log.warning("later checkpoints in the bucket could not be set aside: %s", error)
        if step in self._paths.steps():
            self.saved(step)

    # --- while it trains -------------------------------------------------------------------------------------

    def saved(self, step: int) -> None:
        """Queue a checkpoint that is whole on the disk, with the logs and the best model that belong to it."""
        if self._sync is None or self._side is None:
            return
        side, queue, keep_last = self._side, self._sync.background, self._settings.checkpoint.keep_last

        def publish() -> None:
            self._look(side)
            side.publish_logs()
            if self._paths.best.exists():
                side.publish_file(self._paths.best)
            if side.publish(step, replace=True):
                log.info("%s is in the bucket", step_name(step))
            queue.submit("pruning", "pruning of the bucket", prune, optional=True)

        def prune() -> None:
            side.prune(keep_last, step)

        queue.submit("checkpoint", step_name(step), publish)

    def finished(self) -> None:
        """Queue what a finished run leaves: the final model, the best one, and the logs with the picture."""
        if self._sync is None or self._side is None:
            return
        side = self._side

        def publish() -> None:
            self._look(side)
            side.publish_logs()
            for path in (self._paths.best, self._paths.final):
                if path.exists():
                    side.publish_file(path)

        self._sync.background.submit("final", self._paths.final.name, publish)

    def _look(self, side: RunSync) -> None:
        """See, before anything is published, what a bucket has that was away when the run began."""
        if self._seen:
            return
        began = self._began_at
        if (newest := max(side.published_steps(), default=0)) > began:
            raise PreconditionFailed(
                f"the bucket could not be read when this run began at step {began}, and has {step_name(newest)}",
                where=self.url,
                fix="nothing there is replaced: start again to go on from that, or with another --run-name",
            )
        self._seen = True

    @property
    def unpublished(self) -> frozenset[int]:
        """Steps that are queued or on their way: they must stay on the disk."""
        names = () if self._sync is None else self._sync.pending
        return frozenset(step for name in names if (step := parse_step(name)) is not None)

    def close(self, *, heed_stop: bool = False) -> dict[str, str]:
        """Finish the uploads, for at most `cloud.close_seconds`; name and reason of what is not safe.

        With `heed_stop` what `check` raises ends the waiting and is raised.
        """
        if self._sync is None:
            return {}
        sync, self._sync = self._sync, None

        def tick() -> None:
            self._tick()
            if heed_stop:
                self._check()

        return sync.close(tick=tick)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, reason in self.close().items():
            log.warning("%s is not in the bucket: %s", name, reason)
