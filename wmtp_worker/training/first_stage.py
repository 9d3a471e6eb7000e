"""A value model that an earlier process has trained: whether it will do, and whether the bucket has all of it."""

import logging

from rich.console import Console

from wmtp_worker.checkpoint.export import read_facts
from wmtp_worker.checkpoint.store import make_ready
from wmtp_worker.errors import Interrupted, NotSafeError, RunHeldError, WorkerError
from wmtp_worker.host.stop import StopRequest
from wmtp_worker.settings import Settings
from wmtp_worker.settings.schema import UNNAMED
from wmtp_worker.storage.cloud import CloudSync, Terms
from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.tracking.console import logging_to_console
from wmtp_worker.training.bucket import RunBucket
from wmtp_worker.training.splits import order

log = logging.getLogger(__name__)


def is_finished(settings: Settings, stop: StopRequest, console: Console) -> bool:
    """Whether `final.pt` of a run that was trained with these settings is here now."""
    paths = RunPaths(settings.run.workdir, settings.run.name)
    if settings.run.resume != "auto":
        return False
    swept = make_ready(paths)
    with logging_to_console(settings.logging.level, console), RunBucket(settings, paths, stop.check) as bucket:
        for name in swept:
            log.info("removed %s, left half written by a process that was killed", name)
        bucket.fetch_final()
        made_with = UNNAMED | read_facts(paths.final).get("identity", {})
        # what else is in there are digests, which the second stage compares with its own
        finished = all(made_with.get(key) == value for key, value in (settings.identity() | order(settings)).items())
        if finished:
            log.info("the value model is trained: %s", paths.final)
        return finished


def publish_rest(settings: Settings, stop: StopRequest, console: Console) -> NotSafeError | None:
    """Publish what of a finished run is on this disk alone, as `wmtp checkpoints push` does.

    Returns the error of what is not safe after that. Raises what `stop` raises.
    """
    paths = RunPaths(settings.run.workdir, settings.run.name)
    with (
        logging_to_console(settings.logging.level, console),
        CloudSync(settings.cloud, paths.workdir, stop.check, Terms.of(settings.checkpoint)) as cloud,
    ):
        if cloud.here or not paths.steps():  # what came from the bucket is `final.pt` alone
            return None
        try:
            not_safe = cloud.push_run(paths.run).not_safe
        except Interrupted:
            raise
        except RunHeldError:
            return None  # who trains it publishes it
        except WorkerError as error:
            not_safe = {paths.run: str(error)}
        return RunBucket(settings, paths, stop.check).not_safe_error(not_safe) if not_safe else None
