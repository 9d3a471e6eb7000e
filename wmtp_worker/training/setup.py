"""Stage 0: from settings to a session that is ready to train."""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from rich.console import Console

from wmtp_worker.checkpoint.restore import Checkpoint, find
from wmtp_worker.errors import DiskFullError, SettingsError
from wmtp_worker.host.device import make_deterministic, set_threads
from wmtp_worker.host.limits import disk_free
from wmtp_worker.host.stop import StopRequest
from wmtp_worker.settings import Settings
from wmtp_worker.storage.atomic import set_aside
from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.tracking.heartbeat import Heartbeat
from wmtp_worker.training.bucket import RunBucket
from wmtp_worker.training.gradients import spread
from wmtp_worker.training.group import Group
from wmtp_worker.training.scores import Scorer
from wmtp_worker.training.session import Session
from wmtp_worker.training.splits import order
from wmtp_worker.training.stages import policy_task, value_task
from wmtp_worker.training.task import Task

log = logging.getLogger(__name__)

# all fp32: weights, and AdamW's two moments of those that are trained
_BYTES_OF_WEIGHT, _BYTES_OF_MOMENTS = 4, 8
# the rest is for activations, and a head's logits
_SHARE_OF_DEVICE = 0.6


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
    shards = choose_shards(settings, group, model)
    if shards == 1:  # else only its part goes there
        model.to(group.device)
    gradients = spread(model.train(), group, shards)
    return Session(
        settings=settings,
        paths=paths,
        group=group,
        gradients=gradients,
        task=task,
        optimizer=_optimizer(settings, model),
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


def check_group(settings: Settings, group: Group) -> None:
    """Raise `SettingsError` unless the ranks can share the micro-batches of a step, and the model, evenly."""
    passes, world = settings.training.accumulation, group.world
    if passes % world:
        raise SettingsError(
            f"training.accumulation={passes} micro-batches cannot be shared by {world} processes",
            where=settings.sources.get("training.accumulation", "settings"),
            fix=f"set training.accumulation={-(-passes // world) * world}, and training.micro_batch_size so that a "
            "step has the rows it should have",
        )

    shards = settings.parallel.shards
    if shards != "auto" and world > 1 and world % shards:
        raise SettingsError(
            f"{world} processes cannot hold copies of {shards} shards each",
            where=settings.sources.get("parallel.shards", "settings"),
            fix=f"set parallel.shards to auto, 1, {world} or another number that divides {world}",
        )


def choose_shards(settings: Settings, group: Group, model: torch.nn.Module) -> int:
    """How many ranks hold one copy of the model: `parallel.shards`, or what the device's memory asks for."""
    if group.world == 1:
        return 1
    wanted = settings.parallel.shards
    if wanted == "auto":
        if group.device.type != "cuda":
            return 1
        memory = torch.cuda.get_device_properties(group.device).total_memory
        return 1 if training_bytes(model) < _SHARE_OF_DEVICE * memory else group.world
    return wanted


def training_bytes(model: torch.nn.Module) -> int:
    """What a whole copy takes on each rank: weights, gradients twice (once on their way), moments."""
    parameters = list(model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    frozen = sum(parameter.numel() for parameter in parameters) - trained
    return frozen * _BYTES_OF_WEIGHT + trained * (3 * _BYTES_OF_WEIGHT + _BYTES_OF_MOMENTS)


def _optimizer(settings: Settings, model: torch.nn.Module) -> torch.optim.AdamW:
    """AdamW; matrices decay, norms do not."""
    training = settings.training

    def having(matrix: bool) -> Iterable[torch.nn.Parameter]:
        trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
        return [parameter for parameter in trained if (parameter.ndim >= 2) == matrix]

    groups: list[dict[str, Any]] = [
        {"params": having(True), "weight_decay": training.weight_decay},
        {"params": having(False), "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]  # adapters have no norms
    return torch.optim.AdamW(
        groups, lr=training.lr, betas=(training.beta1, training.beta2), eps=training.eps, fused=True
    )


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
    parameters = list(session.task.model.parameters())
    needed = sum(parameter.numel() for parameter in parameters) * _BYTES_OF_WEIGHT
    needed += sum(parameter.numel() for parameter in parameters if parameter.requires_grad) * _BYTES_OF_MOMENTS
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
