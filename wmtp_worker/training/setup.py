"""Stage 0: from settings to a session that is ready to train."""

import logging

import torch
from rich.console import Console

from wmtp_worker.checkpoint.optimizer import moment_bytes
from wmtp_worker.checkpoint.restore import Checkpoint, find
from wmtp_worker.errors import DiskFullError
from wmtp_worker.host.device import make_deterministic, set_threads
from wmtp_worker.host.limits import disk_free
from wmtp_worker.host.stop import StopRequest
from wmtp_worker.model.sharding import WEIGHT, choose_shards, training_bytes
from wmtp_worker.model.unread import unread
from wmtp_worker.settings import Settings
from wmtp_worker.storage.atomic import set_aside
from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.tracking.heartbeat import Heartbeat
from wmtp_worker.training.bucket import RunBucket
from wmtp_worker.training.compiling import compile_layers
from wmtp_worker.training.gradients import fill, spread
from wmtp_worker.training.group import Group
from wmtp_worker.training.optimizer import make_optimizer
from wmtp_worker.training.scores import Scorer
from wmtp_worker.training.session import Session
from wmtp_worker.training.splits import order
from wmtp_worker.training.stages import policy_task, value_task
from wmtp_worker.training.task import Task

log = logging.getLogger(__name__)


def build_session(
    settings: Settings,
    paths: RunPaths,
    group: Group,
    stop: StopRequest,
    heartbeat: Heartbeat,
    bucket: RunBucket,
    console: Console,
) -> Session:
    """Load data and models. Polls `stop` and `bucket` between the parts, and while it tokenizes and scores.

    Every rank does, each for itself; only what frozen models say is computed once on each machine.
    """
    threads = set_threads(settings.host.threads, group.local_world)
    make_deterministic(group.device)

    def poll(phase: str) -> None:
        stop.check()
        bucket.check()
        heartbeat.beat(phase)

    task: Task
    if settings.run.stage == "value":
        task, digests = value_task(settings, group, poll, heartbeat)
    else:
        scorer = Scorer(settings, group.device, poll, heartbeat, console)
        task, digests = policy_task(settings, group, poll, heartbeat, scorer)
    model: torch.nn.Module = task.model
    shards = _shards(settings, group, model)
    compile_layers(settings, model)
    with heartbeat.during("model"):  # what is unread is read now
        if shards == 1:  # else only its part goes there
            fill(model, unread(model), group.device)
            model.to(group.device)
        gradients = spread(model.train(), group, shards, settings.training.precision)
    return Session(
        settings=settings,
        paths=paths,
        group=group,
        gradients=gradients,
        task=task,
        optimizer=make_optimizer(settings, model),
        identity={
            **settings.identity(),
            **order(settings),
            **{key: digest and f"sha256 {digest}" for key, digest in digests.items()},
        },
        base_model_digest=digests.get("value.backbone") or digests["model.path"],
        threads=threads,
        stop=stop,
        heartbeat=heartbeat,
        bucket=bucket,
    )


def _shards(settings: Settings, group: Group, model: torch.nn.Module) -> int:
    """How many ranks hold one copy of the model."""
    parameters, trained = _count(model)
    needed = training_bytes(parameters, trained, moment_bytes(settings.training.moments))
    cuda = group.device.type == "cuda"
    memory = torch.cuda.get_device_properties(group.device).total_memory if cuda else None
    # where GPUs differ, the smallest decides
    return int(group.most(choose_shards(settings, group.world, needed, memory)))


def _count(model: torch.nn.Module) -> tuple[int, int]:
    """Parameters: all, and those that are trained."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


def restore(session: Session) -> None:
    """Go on from the checkpoint that `run.resume` asks for; whatever that makes obsolete is set aside, not deleted.

    Every rank reads what it holds; what else there is to do and to decide, the first one does.
    """
    session.check()
    checkpoint = _find(session)
    with session.group.ranks.together():
        if checkpoint is not None:
            with session.heartbeat.during("restore"):
                session.restore(checkpoint)
    if session.group.first:
        _settle(session, checkpoint)
        _check_disk(session)
        _log_facts(session)
    session.progress = session.group.of_first(session.progress)


def _find(session: Session) -> Checkpoint | None:
    def heed(size: int) -> None:
        session.check()
        session.heartbeat.beat("restore")

    return find(session.paths, session.settings.run.resume, session.group.ranks, heed=heed)


def _settle(session: Session, checkpoint: Checkpoint | None) -> None:
    """Put in order what lies in the work directory and in the bucket, now that it is known where the run goes on."""
    paths, resume = session.paths, session.settings.run.resume
    if checkpoint is None and resume == "auto":
        session.bucket.check_fresh_start()
    if checkpoint is not None:
        session.look_for_best()
        log.info("resuming from %s", checkpoint.folder)
    later = [paths.step(step) for step in paths.steps() if step > session.progress.step]
    if checkpoint is None and resume == "auto":
        _warn_of_fresh_start(session, damaged=bool(later))
    anew = checkpoint is None and (resume == "never" or bool(later) or paths.final.exists())
    # with auto, later ones did not verify, and stay for inspection
    rewound = checkpoint is not None and resume != "auto" and bool(later)
    obsolete = []
    if anew or rewound or not session.finished:
        obsolete.append(paths.final)
    if anew or rewound:
        # the checkpoints go last: killed before that, the same command finds the same to do
        record = [paths.metrics, paths.record.weights, paths.record.report] if anew else []
        obsolete += [paths.best, *record, *later]
    if obsolete := [path for path in obsolete if path.exists()]:
        log.info("set aside %d items of the earlier run in %s", len(obsolete), set_aside(paths.checkpoints, obsolete))
    session.bucket.restored(session.progress.step)
    if not paths.best.exists():
        session.progress.best_loss, session.progress.without_improvement = None, 0


def _warn_of_fresh_start(session: Session, damaged: bool) -> None:
    paths = session.paths
    if damaged:
        log.warning("no checkpoint of run %r verifies: starting from step 0", paths.run)
    elif session.settings.sources["run.resume"].startswith("--resume"):
        # somebody expects to go on: the name may be another run's, or the volume another one
        runs = sorted({path.parent.name for path in paths.checkpoints.parent.glob("*/step_*")})
        others = f"; there are {', '.join(runs)}" if runs else ""
        log.warning("run %r has no checkpoint to resume%s: starting from step 0", paths.run, others)


def _check_disk(session: Session) -> None:
    parameters, trained = _count(session.task.model)
    needed = parameters * WEIGHT + trained * moment_bytes(session.settings.training.moments)
    free = disk_free(session.paths.checkpoints)
    # the first save takes the place of older ones, where the process before this one trained on with a full disk
    older = [session.paths.step(step) for step in session.paths.steps() if step < session.progress.step]
    free += sum(file.stat().st_size for folder in older for file in folder.iterdir())
    if free < needed and not session.finished:
        raise DiskFullError(
            f"a checkpoint needs {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free",
            where=str(session.paths.checkpoints),
            fix="free some space, or set WMTP_WORKDIR to a larger disk",
        )


def _log_facts(session: Session) -> None:
    parameters = sum(parameter.numel() for parameter in session.task.model.parameters())
    world, shards = session.group.world, session.gradients.shards
    ranks = "" if world == 1 else f", {world} processes, {world // shards} copies in {shards} shards each"
    log.info(
        "run %s: %.1f M parameters, %s, %s, %d threads%s",
        session.paths.run,
        parameters / 1e6,
        session.task,
        session.group.device,
        session.threads,
        ranks,
    )
    if session.settings.model.path and session.settings.data.dataset == "sample":
        log.warning(
            "data.dataset=sample: the packaged problems, enough to try things out; name the data set to train on"
        )
