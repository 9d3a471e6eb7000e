"""The run's side of the bucket: what is fetched before it trains, and what is published while it does."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any, Self

from wmtp_worker.assets.fetch import fetch
from wmtp_worker.errors import ExhaustedError, StorageError
from wmtp_worker.settings import Settings
from wmtp_worker.storage.cloud import CloudSync
from wmtp_worker.storage.layout import RunPaths, parse_step, step_name

log = logging.getLogger(__name__)

_CHECKPOINT = "checkpoint"  # the slot of checkpoints in the queue


class RunBucket:
    """Fetches and publishes one run. Where runs are kept locally only, all of it does nothing.

    Nothing here fails because the bucket is slow or away: the work stays in the work directory, is published when
    the bucket is back, and `close` says what is not safe. A bucket that is not there, or refuses, ends the run before
    it has begun (exit 78).
    """

    def __init__(self, settings: Settings, paths: RunPaths, check: Callable[[], None]) -> None:
        """`url` is where the run is published, None where it is not. The bucket is not asked anything yet."""
        self._settings = settings
        self._paths = paths
        self._check = check
        local = settings.cloud.provider == "local" and settings.cloud.bucket is None
        self._sync = None if local else CloudSync(settings.cloud, paths.workdir, self._poll)
        self._side = None if self._sync is None else self._sync.run(paths.run)
        self.url = None if self._side is None else f"{self._side.store.url}/{self._side.prefix}"
        # whether the bucket told what it has: if not, nothing there is replaced
        self._seen = False
        self._failed = False

    def fetch(self, tick: Callable[[], None]) -> None:
        """Bring model, data and the checkpoint to resume from into the work directory, all at once.

        `tick` is called about once a second meanwhile. Raises `AccessDenied`, `BucketNotFound`, `InputError`,
        `IntegrityError`, `DiskFullError`, and `ExhaustedError` where model or data cannot be had without the bucket.
        """
        transfer = None if self._sync is None else self._sync.transfer
        started = time.perf_counter()
        with ThreadPoolExecutor(2, thread_name_prefix="fetch") as pool:
            jobs: list[Future[Any]] = [
                pool.submit(fetch, self._settings, transfer, self._poll),
                pool.submit(self._fetch_checkpoint),
            ]
            while (state := wait(jobs, timeout=1)).not_done:
                tick()
                # what one of them cannot have, no other is waited for
                self._failed = any(job.exception() is not None for job in state.done)
            for job in jobs:
                job.result()
        if transfer is not None:
            log.info("the bucket is %s, looked through in %.1f s", self.url, time.perf_counter() - started)

    def _fetch_checkpoint(self) -> None:
        if self._side is None:
            return
        try:
            step = self._side.fetch_checkpoint(self._settings.run.resume)
        except ExhaustedError as error:
            log.warning("the bucket cannot be reached, going on with what is here: %s", error)
            return
        self._seen = True
        if step is not None:
            log.info("fetched %s from the bucket", step_name(step))

    def fetch_weights(self, weights: str) -> None:
        """Bring `final`, `best` or a step's checkpoint, the tokenizer and the data, as far as they are not here."""
        fetch(self._settings, None if self._sync is None else self._sync.transfer, self._poll)
        if self._side is None:
            return
        if weights.isdecimal():
            self._side.fetch_checkpoint(int(weights))
        elif (path := {"final": self._paths.final, "best": self._paths.best}.get(weights)) and not path.exists():
            self._side.fetch_file(path)

    def _poll(self) -> None:
        self._check()
        if self._failed:
            raise StorageError("given up, because something else could not be fetched")

    def restored(self, step: int) -> None:
        """Say where the run goes on: later steps in the bucket are set aside where the user chose an earlier one."""
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

    def saved(self, step: int) -> None:
        """Queue a checkpoint that is whole on the disk, with the logs and the best model that belong to it."""
        if self._sync is None or self._side is None:
            return
        side, keep_last = self._side, self._settings.checkpoint.keep_last

        def publish() -> None:
            side.publish_logs()
            if self._paths.best.exists():
                side.publish_file(self._paths.best)
            if side.publish(step, replace=self._seen):
                log.info("%s is in the bucket", step_name(step))
            side.prune(keep_last, step)

        self._sync.background.submit(_CHECKPOINT, step_name(step), publish)

    def finished(self) -> None:
        """Queue what a finished run leaves: the final model, the best one, and the logs with the picture."""
        if self._sync is None or self._side is None:
            return
        side = self._side

        def publish() -> None:
            side.publish_logs()
            for path in (self._paths.best, self._paths.final):
                if path.exists():
                    side.publish_file(path)

        self._sync.background.submit("final", self._paths.final.name, publish)

    @property
    def unpublished(self) -> frozenset[int]:
        """Steps that are queued or on their way: they must stay on the disk."""
        names = () if self._sync is None else self._sync.pending
        return frozenset(step for name in names if (step := parse_step(name)) is not None)

    def close(self, tick: Callable[[], None] = lambda: None) -> dict[str, str]:
        """Finish the uploads, for at most `cloud.close_seconds`; name and reason of what is not safe."""
        if self._sync is None:
            return {}
        sync, self._sync = self._sync, None
        return sync.close(tick=tick)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
