"""A whole run: stage 0 set-up, stage 2 training, stage 3 evaluation and export."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from wmtp_worker.checkpoint.ledger import How, Ledger, Phases, read_heartbeat
from wmtp_worker.checkpoint.losses import summarise
from wmtp_worker.checkpoint.manifest import read_manifest
from wmtp_worker.checkpoint.store import make_ready, sweep
from wmtp_worker.errors import (
    CheckpointError,
    DiskFullError,
    Interrupted,
    NotSafeError,
    RunHeldError,
    WorkerError,
)
from wmtp_worker.host.notices import NoticeWatcher
from wmtp_worker.host.stop import StopRequest
from wmtp_worker.host.watchdog import Watchdog
from wmtp_worker.host.workdir import prepare
from wmtp_worker.model.sharding import check_ranks
from wmtp_worker.redact import redact
from wmtp_worker.settings import Settings
from wmtp_worker.settings.stages import policy_run, value_run
from wmtp_worker.storage.layout import RunPaths, step_name
from wmtp_worker.storage.runlock import run_lock
from wmtp_worker.tracking.console import LogFile, logging_to_console
from wmtp_worker.tracking.facts import describe
from wmtp_worker.tracking.heartbeat import Heartbeat
from wmtp_worker.tracking.metrics import MetricsLog
from wmtp_worker.tracking.session import Tracking
from wmtp_worker.training.bucket import RunBucket
from wmtp_worker.training.first_stage import is_finished, publish_rest
from wmtp_worker.training.follower import NoMetrics, NoTracking
from wmtp_worker.training.group import Group, RankLost, join
from wmtp_worker.training.loop import train
from wmtp_worker.training.report import note_settings, write_in_time
from wmtp_worker.training.session import Session
from wmtp_worker.training.setup import build_session, restore

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """What a finished run says about itself."""

    run: str
    step: int
    steps_taken: int  # by this process
    resumed_from: int | None
    tokens: int
    seconds: float
    stopped_early: bool
    validation: dict[str, Any]
    best_step: int
    best_loss: float
    paths: RunPaths
    bucket: str | None  # where all of it is, too

    @property
    def files(self) -> dict[str, Path]:
        """Where to look, by what is there."""
        paths = self.paths
        named = {
            "report": paths.record.report,
            "metrics": paths.metrics,
            "log": paths.training_log,
            "final model": paths.final,
            "best model": paths.best,
            "checkpoints": paths.checkpoints,
        }
        return {name: path for name, path in named.items() if path.exists()}


# beyond the watchdog's: it should see a collective that hangs before that fails
_TIMEOUT_FACTOR, _LONGEST_WAIT = 2.0, 3600.0


def run(settings: Settings, stop: StopRequest, console: Console) -> Summary | None:
    """Train a run to its end, from wherever its newest checkpoint left it, here or in the bucket.

    Where there are several processes (`group.join`) each calls this; None for those that are not the first.

    A run that needs a value model which is not named trains that first, as a run of its own beside it, unless its
    `final.pt` is here or in the bucket. Raises `RunHeldError`, `Interrupted` (everything is saved),
    `TrainingDiverged`, `DiskFullError`, `InputError`, `CheckpointError`, `NotSafeError` (finished, not all is in the
    bucket), and the bucket's `StorageError` before the training has begun; each leaves the checkpoints that were there
    whole.
    """
    limit = _TIMEOUT_FACTOR * settings.host.hang_seconds or _LONGEST_WAIT
    with join(settings.host.device, limit) as group:
        check_ranks(settings, group.world)
        return _stages(settings, group, stop, console)


def _stages(settings: Settings, group: Group, stop: StopRequest, console: Console) -> Summary | None:
    not_safe: NotSafeError | None = None
    train_stage = train_run if group.first else follow_run
    if settings.trains_values:
        values = value_run(settings)
        if settings.run.stage == "value":
            return train_stage(values, group, stop, console)
        finished = group.first and is_finished(values, stop, console)
        if finished:
            not_safe = publish_rest(values, stop, console)
        group.after_first("finished", stop.check)
        if not group.of_first(finished):
            try:
                train_stage(values, group, stop, console)
            except NotSafeError as error:  # to be told, but no reason for the policy to wait
                not_safe = error
    summary = train_stage(policy_run(settings), group, stop, console)
    if not_safe is not None and (not_safe := publish_rest(values, stop, console)) is not None:
        raise not_safe
    return summary


def train_run(settings: Settings, group: Group, stop: StopRequest, console: Console) -> Summary:
    """Train one run, the policy's or a value model's, as the first rank: see `run`."""
    try:
        with group.company():
            return _train_run(settings, group, stop, console)
    finally:
        with suppress(RankLost):
            group.after_first(f"{settings.run.name}: end")


def _train_run(settings: Settings, group: Group, stop: StopRequest, console: Console) -> Summary:
    started = time.perf_counter()
    phases = Phases()
    phases.done("boot")
    paths = RunPaths(settings.run.workdir, settings.run.name)
    made_ready = make_ready(paths)
    with (
        run_lock(paths.lock),
        logging_to_console(settings.logging.level, console, settings.logging.format),
        Watchdog(settings.host.hang_seconds, log_file=paths.training_log) as watchdog,
        NoticeWatcher(settings.host.notices, stop),
    ):
        swept = [*made_ready, *sweep(paths)]
        before = read_heartbeat(paths.heartbeat)
        heartbeat = Heartbeat(paths.heartbeat, paths.run, watchdog.beat)
        with (
            LogFile(paths.training_log, settings.logging.format) as file,
            RunBucket(settings, paths, stop.check, lambda: heartbeat.beat("bucket")) as bucket,
        ):
            for name in swept:
                log.info("removed %s, left half written by a process that was killed", name)
            try:
                bucket.fetch()
                phases.done("fetch")
                group.after_first(f"{paths.run}: fetch")
                session = build_session(settings, paths, group, stop, heartbeat, bucket, console)
                phases.done("setup")
                bucket.wait_for_checkpoint()
                phases.done("checkpoint")
                group.after_first(f"{paths.run}: checkpoint")
                # not before: an earlier machine's log, and its record, may have come from the bucket
                file.open()
                ledger = Ledger.begin(
                    paths.ledger,
                    paths.metrics,
                    phases,
                    gpus=group.world if group.device.type == "cuda" else 0,
                    price_per_hour=settings.host.price_per_hour,
                    resume=settings.run.resume,
                    heartbeats=[before, bucket.last_heartbeat],
                )
                return _run(session, ledger, console, started)
            except Exception as error:
                # the console shows it too, by the command line; the file is what is left after the machine is gone
                log.debug("ended by %s", error, exc_info=not isinstance(error, WorkerError))
                raise


def follow_run(settings: Settings, group: Group, stop: StopRequest, console: Console) -> None:
    """`train_run` of every other rank: it trains with the first one, writes nothing of its own, and ends after it."""
    paths = RunPaths(settings.run.workdir, settings.run.name)
    prepare(paths.workdir)
    with (
        logging_to_console("error", Console(stderr=True)),
        Watchdog(settings.host.hang_seconds, log_file=paths.training_log) as watchdog,
        RunBucket(settings, paths, stop.check, active=False) as bucket,
    ):

        def tick() -> None:
            watchdog.beat()  # the first one's watches for both
            stop.check()

        def wait(what: str) -> None:
            group.after_first(f"{paths.run}: {what}", tick)

        heartbeat = Heartbeat(None, paths.run, watchdog.beat)
        wait("fetch")
        session = build_session(settings, paths, group, stop, heartbeat, bucket, Console(quiet=True))
        session.tracking = NoTracking()
        wait("checkpoint")
        try:
            with group.company():
                restore(session)
                with session.open(NoMetrics(), Ledger()) as saving:
                    _train_or_save(session, Ledger(), Console(quiet=True))
                    saving.finish()
                _export(session)
        except RankLost:
            raise
        except Interrupted:
            _wait_for_end(group, paths, watchdog)
            raise
        _wait_for_end(group, paths, watchdog)


def _wait_for_end(group: Group, paths: RunPaths, watchdog: Watchdog) -> None:
    """Who started us may take the first end of a process for a reason to end all, in the midst of a save."""
    with suppress(RankLost):
        group.after_first(f"{paths.run}: end", watchdog.beat)


def _run(session: Session, ledger: Ledger, console: Console, started: float) -> Summary:
    paths, heartbeat = session.paths, session.heartbeat
    with _ending(session, ledger):
        restore(session)
        note_settings(session.settings, paths)
        ledger.phases.done("restore")
        metrics = MetricsLog(paths.metrics, session.progress.metrics_size)
    first = session.progress.step
    # the innermost: what it writes is sent, too
    with metrics, _tracking(session) as tracking, _ending(session, ledger):
        session.tracking = tracking
        with session.open(metrics, ledger) as saving:
            _train_or_save(session, ledger, console)
            saving.finish()
        session.check()
        _export(session)
        ledger.end("finished", session.progress.step)
        write_in_time(paths.record, session.stop)
        tracking.mark("FINISHED")
        _publish(session)
        heartbeat.beat("done", step=session.progress.step)
    log.info("%s", summarise(ledger.events).sentence())
    return _summary(session, first, time.perf_counter() - started)


@contextmanager
def _ending(session: Session, ledger: Ledger) -> Iterator[None]:
    """Put what ends the run into its ledger, and make its page."""
    paths = session.paths
    try:
        yield
    except Exception as error:
        how: How = "notice" if isinstance(error, Interrupted) else "failed"
        ledger.end(how, session.progress.step, detail=redact(str(error)))
        theirs = isinstance(error, RunHeldError)  # another machine goes on with it
        if ledger.ended != "finished" and not theirs and paths.metrics.exists():
            write_in_time(paths.record, session.stop)
        raise


def _tracking(session: Session) -> Tracking:
    """Not before the metrics are cut back to the checkpoint: what is read from them is what counts."""
    settings, bucket = session.settings, session.bucket
    return Tracking(
        settings.tracking,
        session.paths,
        describe(settings, session.identity, session.group.device.type, bucket.url),
        start=session.progress.step,
        resume=settings.run.resume,
        seconds_left=lambda: session.stop.seconds_left,
        measure=dict if bucket.url is None else lambda: {"checkpoint_lag_steps": bucket.lag},
    )


def _export(session: Session) -> None:
    """Write `final.pt` unless it is there, if need be in the place of old checkpoints; where that is not enough, the
    run's end says so."""
    paths = session.paths
    if session.group.of_first(paths.final.exists()):
        return
    weights = session.whole_weights()
    with session.heartbeat.during("export", step=session.progress.step):
        try:
            try:
                session.export(paths.final, weights)
            except DiskFullError:
                session.saving.make_room()
                session.export(paths.final, weights)
        except DiskFullError as error:
            log.warning("%s is NOT saved: %s", paths.final.name, error)


def _publish(session: Session) -> None:
    """Send what a finished run leaves. Raises what keeps it from being safe: here, in the bucket, or in our hands."""
    paths, bucket = session.paths, session.bucket
    bucket.finished()
    try:
        not_safe = bucket.close(heed_stop=True)
    except Interrupted as interruption:
        what = f"{interruption.what}; the run is finished, but not all of it is in the bucket yet"
        raise Interrupted(what, fix=interruption.fix) from None
    bucket.check()
    if not_safe:
        raise bucket.not_safe_error(not_safe)
    if lacking := [path.name for path in (paths.step(session.progress.step), paths.final) if not path.exists()]:
        raise DiskFullError(
            f"the run is finished, but {' and '.join(lacking)} could not be saved: the disk is full",
            where=str(paths.checkpoints),
            fix="free some space and start again: the steps since the last checkpoint are trained again",
        )


def _train_or_save(session: Session, ledger: Ledger, console: Console) -> None:
    try:
        with session.group.company():
            train(session, console)
    except Interrupted as interruption:
        if session.sharded and isinstance(interruption, RankLost):
            raise  # a part of the model is gone
        progress, stop = session.progress, session.stop
        ledger.end("notice", progress.step, detail=stop.reason or "")
        session.tracking.mark("KILLED")
        try:
            session.saving.emergency(session.snapshot, progress.step, progress.saved_at, stop)
        except DiskFullError as error:
            log.warning("%s is NOT saved: %s", step_name(progress.step), error)
        finally:
            not_safe = session.bucket.close(seconds=stop.seconds_left)
        place = _what_is_saved(session)
        if not_safe:
            place += f"; not in the bucket yet: {', '.join(not_safe)}"
        log.info("%s; saved: %s", interruption.what, place)
        # never, or a step, would do again what was just done
        again = interruption.fix if session.settings.run.resume == "auto" else "go on from there with --resume auto"
        raise Interrupted(f"{interruption.what}; saved: {place}", fix=again) from None


def _what_is_saved(session: Session) -> str:
    """The newest checkpoint on the disk; and the one that the run goes on from, where that is another."""
    paths = session.paths
    steps = [step for step in paths.steps() if step <= session.progress.step]
    if not steps:
        return "nothing yet"
    newest, full = steps[-1], next((step for step in reversed(steps) if _is_full(paths.step(step))), 0)
    if newest == full:
        return str(paths.step(newest))
    only = f"weights only: --resume auto goes on from step {full}, --resume {newest} from these with a new optimizer"
    return f"{paths.step(newest)} ({only})"


def _is_full(checkpoint: Path) -> bool:
    try:
        return read_manifest(checkpoint).kind == "full"
    except CheckpointError:
        return False


def _summary(session: Session, first: int, seconds: float) -> Summary:
    progress = session.progress
    assert progress.validation is not None  # train() ends with a validation
    assert progress.best_loss is not None
    return Summary(
        run=session.paths.run,
        step=progress.step,
        steps_taken=progress.step - first,
        resumed_from=session.resumed_from,
        tokens=progress.tokens,
        seconds=seconds,
        stopped_early=progress.stopped_early,
        validation=progress.validation,
        best_step=progress.best_step,
        best_loss=progress.best_loss,
        paths=session.paths,
        bucket=session.bucket.url,
    )
