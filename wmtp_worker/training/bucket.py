"""The run's side of the bucket: what is fetched before it trains, and what is published while it does."""

import logging
import shlex
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from wmtp_worker.assets.fetch import fetch
from wmtp_worker.assets.resolve import missing_value_run
from wmtp_worker.checkpoint.manifest import NewerFormatError, parse_manifest
from wmtp_worker.errors import (
    AccessDenied,
    BucketNotFound,
    CheckpointError,
    DiskFullError,
    ExhaustedError,
    IntegrityError,
    NotSafeError,
    PreconditionFailed,
    RunHeldError,
    StorageError,
)
from wmtp_worker.settings import Settings
from wmtp_worker.storage.cloud import CloudSync, Terms, is_here
from wmtp_worker.storage.layout import RunPaths, parse_step, step_name
from wmtp_worker.storage.lease import Lease
from wmtp_worker.storage.runs import RunSync
from wmtp_worker.training.errands import Errands, GivenUpError

log = logging.getLogger(__name__)


class RunBucket:
    """Fetches and publishes one run, as the holder of its lease. Where runs are kept locally only, it does nothing.

    Nothing here fails because the bucket is slow or away: the work stays in the work directory, is published when
    the bucket is back, and `close` says what is not safe. A bucket that is not there, or refuses, ends the run before
    it has begun (exit 78); so does another worker that holds the run (79), and one that takes it later: poll `check`.
    """

    def __init__(
        self,
        settings: Settings,
        paths: RunPaths,
        check: Callable[[], None],
        tick: Callable[[], None] = lambda: None,
        *,
        active: bool = True,
    ) -> None:
        """`check` raises to stop what is fetched; `tick` is called about once a second while something is waited for.
        Not `active`: nothing is done, as where runs are kept locally only. Another process takes care of the bucket.

        `url` is where the run is published, None where it is not. The bucket is not asked anything yet.
        """
        self._settings = settings
        self._paths = paths
        self._check = check
        self._tick = tick
        local = not active or is_here(settings.cloud, paths.workdir)
        terms = Terms.of(settings.checkpoint)
        self._errands = Errands(check, tick)
        self._sync = None if local else CloudSync(settings.cloud, paths.workdir, self._errands.poll, terms)
        self._side = None if self._sync is None else self._sync.run(paths.run)
        self.url = None if self._side is None else f"{self._side.store.url}/{self._side.keys.prefix}"
        self._may_publish = False  # whether the lease is ours, or there is to be none
        self._lease: Lease | None = None
        self._held: RunHeldError | None = None  # where the lease could only be asked for while training
        self._refused: PreconditionFailed | None = None  # where the bucket turned out to have more than we
        # whether the bucket told what it has of this run: if not, nothing there is replaced
        self._seen = False
        self._began_at = 0
        self._begun = False  # whether the bucket knows where this run goes on: before that nothing is published
        self._finished = False
        self._left: Mapping[str, str] = {}  # what was not safe at the end, and why
        self._saved = self._published = 0
        self.uploading = False  # whether a checkpoint is being sent just now
        self._facts: Mapping[str, Any] = {}
        # called in the uploads' thread with a step that was published, the seconds that took and the bytes really sent
        self.on_published: Callable[[int, float, int], object] = lambda step, seconds, sent: None
        # what the bucket's heartbeat.json said before this process
        self.last_heartbeat: dict[str, Any] | None = None

    # --- who holds the run -----------------------------------------------------------------------------------

    def _hold(self, sync: CloudSync, side: RunSync) -> None:
        """Take the lease, unless it is ours: from now on nobody else publishes this run."""

        def taken() -> None:
            with suppress(StorageError):
                self.last_heartbeat = side.read_heartbeat()

        if not self._may_publish:
            self._lease = sync.hold(side, self._status, taken)
            self._may_publish = True

    def check(self) -> None:
        """Raises `RunHeldError` (79) once another worker has this run, and what could not be fetched, as soon as that
        is known. Asks the bucket nothing: to be polled.
        """
        self._errands.raise_error()
        if self._held is not None:
            raise RunHeldError(self._held.what, where=self._held.where, fix=self._held.fix)
        if self._lease is not None:
            self._lease.check()

    def status(self, **facts: Any) -> None:
        """What `heartbeat.json` in the bucket shall say from now on: step, loss, tokens_per_second, phase, …"""
        self._facts = {**self._facts, **facts}

    def _status(self) -> Mapping[str, Any]:
        return {"run": self._paths.run, **self._facts, "last_published_step": self._published, "lag": self.lag}

    @property
    def lag(self) -> int:
        """Steps of training that are on this disk alone: the newest saved step less the newest published one."""
        return max(0, self._saved - self._published)

    # --- before the training ---------------------------------------------------------------------------------

    def fetch(self) -> None:
        """Bring models and data into the work directory. The checkpoint to resume from is on its way meanwhile.

        Raises `AccessDenied`, `BucketNotFound`, `InputError`, `IntegrityError`, `DiskFullError`, and `ExhaustedError`
        where model or data are only in the bucket, and that cannot be reached; and what `wait_for_checkpoint` raises.
        """
        self._errands.start("checkpoint", self._fetch_checkpoint)
        self._errands.start("assets", self._fetch_assets)
        self._wait_for("assets")

    def _fetch_assets(self) -> None:
        fetch(self._settings, None if self._sync is None else self._sync.transfer, self._errands.poll)
        value = missing_value_run(self._settings)
        if self._sync is not None and value is not None:
            self._sync.run(value.run).fetch_file(value.final)

    def wait_for_checkpoint(self) -> None:
        """Until the checkpoint to resume from is here, and the logs that belong to it.

        Raises `RunHeldError`, `IntegrityError`, `DiskFullError`, `CheckpointError` for one of a newer format, and
        `ExhaustedError` where the wanted step is only in the bucket.
        """
        self._wait_for("checkpoint")

    def _wait_for(self, errand: str) -> None:
        try:
            self._errands.wait_for(errand)
        except BaseException:
            self._leave()
            raise

    def _leave(self) -> None:
        """End what is still being done; what hangs keeps the bucket, and is left behind."""
        if not self._errands.end():
            self._sync = None

    def _fetch_checkpoint(self) -> None:
        if self._sync is None or self._side is None:
            return
        resume, started = self._settings.run.resume, time.perf_counter()
        try:
            # before the choice: what others publish after it does not count
            self._hold(self._sync, self._side)
            step = self._side.fetch_checkpoint(resume, self._accept)
            self._side.drop_beginnings()
        except ExhaustedError as error:
            if isinstance(resume, int) and resume not in self._paths.steps():
                raise
            log.warning("the bucket cannot be reached, going on with what is here: %s", error)
            return
        self._seen = True
        log.info("the bucket is %s, looked through in %.1f s", self.url, time.perf_counter() - started)
        if step is not None:
            self._published = step
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
        fetch(self._settings, None if self._sync is None else self._sync.transfer, self._errands.poll)
        if self._side is None:
            return
        if weights.isdecimal():
            self._side.fetch_checkpoint(int(weights), self._accept)
        elif (path := {"final": self._paths.final, "best": self._paths.best}.get(weights)) and not path.exists():
            self._side.fetch_file(path)

    def fetch_final(self) -> None:
        """Bring the run's `final.pt`, unless it is here, or nowhere. A bucket that is away is only warned about."""
        if self._side is None or self._paths.final.exists():
            return
        try:
            self._side.fetch_file(self._paths.final)
        except ExhaustedError as error:
            log.warning("the bucket cannot be reached, going on with what is here: %s", error)

    def check_fresh_start(self) -> None:
        """To be asked before a run begins at step 0 though it was to go on from its newest checkpoint.

        Raises `CheckpointError` where the bucket has checkpoints that look whole: they would not count any more.
        """
        if self._side is None or not self._seen:
            return
        try:
            steps = self._side.whole_steps()
        except ExhaustedError as error:
            log.warning("the bucket cannot be reached, nothing there is replaced: %s", error)
            self._seen = False
            return
        if steps:
            raise CheckpointError(
                f"no checkpoint could be restored, though {', '.join(map(step_name, steps))} in the bucket look whole",
                where=self.url,
                fix="the lines above say what is wrong with each; --resume never begins anew on purpose, and sets "
                "them aside",
            )

    def restored(self, step: int) -> None:
        """Say where the run goes on: later steps in the bucket are set aside where the user chose an earlier one.

        Raises `RunHeldError`, `AccessDenied`, `BucketNotFound`, and what `check` raises.
        """
        self._began_at = step
        if self._sync is None or self._side is None:
            return
        sync, side = self._sync, self._side

        def begin() -> None:
            try:
                self._begin(side)
            except (AccessDenied, BucketNotFound, GivenUpError):
                raise
            except (StorageError, DiskFullError) as error:
                log.warning("the bucket is told later where this run goes on, before anything is published: %s", error)

        if self._seen:
            self._errands.start("begin", begin)
            self._wait_for("begin")
        if step in self._paths.steps():
            self.saved(step)

        def sweep() -> None:
            self._look(sync, side)
            side.sweep()

        # the first use of the queue: from here on a stop does not stop what is sent
        sync.background.submit("sweep", "sweeping of the bucket", sweep, optional=True)

    def _begin(self, side: RunSync) -> None:
        """Tell the bucket where this run goes on, and move away what a user's choice has left behind."""
        if self._begun:
            return
        if self._settings.run.resume != "auto":
            if aside := side.set_aside_after(self._began_at):
                log.info("set aside %s in the bucket", ", ".join(map(step_name, aside)))
        elif self._lease is not None:
            self._lease.began(self._began_at)
        self._begun = True

    # --- while it trains -------------------------------------------------------------------------------------

    def saved(self, step: int) -> None:
        """Queue a checkpoint that is whole on the disk, with the logs and the best model that belong to it."""
        if self._sync is None or self._side is None:
            return
        sync, side, settings = self._sync, self._side, self._settings.checkpoint
        queue = sync.background
        self._saved = step

        def publish() -> None:
            self._look(sync, side)
            side.publish_logs()
            started = time.monotonic()
            self.uploading = True
            try:
                sent = side.publish(step)
            finally:
                self.uploading = False
            self._published = step
            if sent is not None:
                self.on_published(step, time.monotonic() - started, sent)
                log.info("%s is in the bucket", step_name(step))
            queue.submit("pruning", "pruning of the bucket", prune, optional=True)

        def prune() -> None:
            side.prune(settings.keep_last, step, settings.keep_every)

        queue.submit("checkpoint", step_name(step), publish)

    def finished(self) -> None:
        """Queue what a finished run leaves: the final model, the best one, and the logs with the report."""
        if self._sync is None or self._side is None:
            return
        sync, side = self._sync, self._side

        def publish() -> None:
            self._look(sync, side)
            side.publish_logs()
            for path in (self._paths.best, self._paths.final):
                if path.exists():
                    side.publish_file(path)
            side.catalogue.ensure(fresh=True)  # then all of it was sent by the holder

        self._finished = True
        sync.background.submit("final", self._paths.final.name, publish)

    def _look(self, sync: CloudSync, side: RunSync) -> None:
        """Before anything is published: hold the run, see what a bucket has that was away when the run began.

        Raises `RunHeldError` where another worker has it, `PreconditionFailed` where it has more than this run.
        """
        if self._refused is not None:
            raise self._refused
        try:
            self._hold(sync, side)
        except RunHeldError as error:
            self._held = error
            raise
        began = self._began_at
        if not self._seen and (newest := max(side.published_steps(), default=0)) > began:
            self._refused = PreconditionFailed(
                f"the bucket could not be read when this run began at step {began}, and has {step_name(newest)}",
                where=self.url,
                fix="nothing there is replaced: --resume auto goes on from that, --resume with the newest step of the "
                "work directory sets it aside; or use another --run-name",
            )
            if self._lease is not None:
                sync.let_go(self._lease)
            raise self._refused
        self._seen = True
        self._begin(side)

    @property
    def unpublished(self) -> frozenset[int]:
        """Steps that are queued, on their way, or were not safe at the end: they must stay on the disk."""
        names = self._left if self._sync is None else self._sync.pending
        return frozenset(step for name in names if (step := parse_step(name)) is not None)

    @property
    def push_command(self) -> str:
        """What publishes later what is only in the work directory: the whole command line, for a shell."""
        cloud = self._settings.cloud
        variables = {
            "WMTP_WORKDIR": self._paths.workdir.absolute(),
            "CLOUD_PROVIDER": cloud.provider,
            "CLOUD_BUCKET": cloud.bucket,
            "CLOUD_PREFIX": cloud.prefix,
            "CLOUD_ENDPOINT_URL": cloud.endpoint_url,
        }
        given = [f"{name}={shlex.quote(str(value))}" for name, value in variables.items() if value]
        return " ".join([*given, "wmtp checkpoints push", shlex.quote(self._paths.run)])

    def not_safe_error(self, not_safe: Mapping[str, str]) -> NotSafeError:
        """The error (74) of a finished run for what `close` returned: what is not safe, why, and what to do."""
        return NotSafeError(
            f"the run is finished, but not in the bucket yet: {', '.join(not_safe)}; {next(iter(not_safe.values()))}",
            where=self.url,
            fix=f"when the bucket is back: {self.push_command}",
        )

    def close(self, *, heed_stop: bool = False, seconds: float | None = None) -> dict[str, str]:
        """Send the logs, finish the uploads, for at most `seconds`, or cloud.close_seconds; what is not safe, and why.

        Then the lease is released. With `heed_stop` what `check` raises ends the waiting and is raised.
        """
        self._leave()
        if self._sync is None or self._side is None:
            return {}
        sync = self._sync
        if self._begun and not self._finished and (self._lease is None or not self._lease.lost):
            # how it ended, even where there is nothing else to send
            sync.background.submit("logs", "logs", self._side.publish_logs, optional=True)

        def tick() -> None:
            self._tick()
            if heed_stop:
                self._check()

        limits = [limit for limit in (seconds, self._settings.cloud.close_seconds) if limit is not None]
        self._left, self._sync = sync.pending, None
        self._left = sync.close(min(limits), tick=tick)
        return dict(self._left)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, reason in self.close().items():
            log.warning("%s is not in the bucket: %s", name, reason)
