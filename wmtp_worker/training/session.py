"""What a run is made of while it trains, and how that becomes a checkpoint and comes back."""

import hashlib
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

import wmtp_worker
from wmtp_worker.checkpoint.export import save_weights, step_of
from wmtp_worker.checkpoint.ledger import Ledger
from wmtp_worker.checkpoint.optimizer import (
    MOMENT_TYPES,
    expected_tensors,
    load_optimizer,
    optimizer_tensors,
    read_optimizer,
)
from wmtp_worker.checkpoint.ranks import ALONE, logical_name
from wmtp_worker.checkpoint.restore import Checkpoint
from wmtp_worker.checkpoint.snapshot import FROZEN, MODEL, OPTIMIZER, Snapshot, split_frozen
from wmtp_worker.data.sampler import Position
from wmtp_worker.errors import InputError, TrainingDiverged, WorkerError
from wmtp_worker.host.stop import StopRequest
from wmtp_worker.model.loading import check_shapes, load_tensors, tensors
from wmtp_worker.redact import redact, redact_values
from wmtp_worker.settings import Settings
from wmtp_worker.settings.schema import UNNAMED
from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.tracking.heartbeat import Heartbeat
from wmtp_worker.tracking.metrics import MetricsLog
from wmtp_worker.tracking.session import Tracking
from wmtp_worker.training.bucket import RunBucket
from wmtp_worker.training.follower import NoMetrics, NoSaving, NoTracking
from wmtp_worker.training.gradients import Gradients, gather_whole
from wmtp_worker.training.group import Group
from wmtp_worker.training.saving import Saving
from wmtp_worker.training.task import Task
from wmtp_worker.weighting.statistics import MovingAverage

log = logging.getLogger(__name__)

STATE = "state.json"
SETTINGS = "settings.json"
CONFIG = "config.json"
POLICY_MARK = "weighting.family"  # only policies have it in their identity

Count = Annotated[int, Field(ge=0)]


@dataclass
class Progress:
    """Everything that changes as training goes, apart from weights and optimizer: one small JSON document.

    No random state is in it: whatever is random is drawn anew from (seed, epoch) or (seed, step).
    """

    step: Count = 0
    position: Position = field(default_factory=Position)
    tokens: Count = 0  # trained on, padding left out
    validated_at: Count = 0  # the step of the last validation
    saved_at: Count = 0
    validation: dict[str, Any] | None = None
    best_loss: float | None = None
    best_step: Count = 0
    without_improvement: Count = 0  # validations in a row
    stopped_early: bool = False
    metrics_size: Count = 0  # bytes of metrics.jsonl that this state stands for

    @property
    def best_is_lost(self) -> bool:
        """Whether there was a best model that is not there any more."""
        return self.validation is not None and self.best_loss is None


@dataclass(frozen=True)
class State:
    """The content of `state.json`: how far the run is, what its last bits depend on, what the weighting remembers."""

    progress: Progress
    threads: int
    device: str
    weighting: Mapping[str, MovingAverage] = field(default_factory=dict)
    ranks: int = 1


@dataclass
class Session:
    """One run, assembled by `setup.build_session` and driven by `loop.train`."""

    settings: Settings
    paths: RunPaths
    group: Group
    gradients: Gradients
    task: Task
    optimizer: torch.optim.Optimizer
    identity: dict[str, Any]
    base_model_digest: str | None
    threads: int
    stop: StopRequest
    heartbeat: Heartbeat
    bucket: RunBucket
    progress: Progress = field(default_factory=Progress)
    resumed_from: int | None = None
    metrics: MetricsLog | NoMetrics = field(init=False)
    saving: Saving | NoSaving = field(init=False)
    tracking: Tracking | NoTracking = field(init=False)

    def open(self, metrics: MetricsLog | NoMetrics, ledger: Ledger) -> Saving | NoSaving:
        """What the loop needs beyond a restored session: where its numbers go, and how it is saved.

        Where each rank has the whole model, the first saves alone; shards are written by all.
        """
        self.metrics = metrics
        if not self.group.first and not self.sharded:
            self.saving = NoSaving()
            return self.saving
        self.saving = Saving(
            self.settings,
            self.paths,
            self.bucket,
            ledger,
            self.resumed_from,
            self._inspect,
            self._wait,
            writers=self.group.writers if self.sharded else ALONE,
            ranks=self.group.ranks if self.sharded else ALONE,
        )
        trainable, _ = split_frozen(self.task.model.named_parameters())
        moments = expected_tensors(self.parameter_names, self._moments)
        to_come = 0
        if self.group.device.type == "cpu":  # gradients, and the moments of an optimizer that was not restored
            state = {} if self.optimizer.state else moments
            to_come = sum(value.nbytes for value in (*trainable.values(), *state.values())) // self.gradients.shards
        exported = {} if self.sharded else tensors(self.task.model)  # those of shards are put together when it is time
        self.saving.prepare({MODEL: trainable, OPTIMIZER: moments}, exported, to_come)
        return self.saving

    @property
    def sharded(self) -> bool:
        """Whether this rank holds a part of the model only."""
        return self.gradients.shards > 1

    @property
    def newest_checkpoint(self) -> Path | None:
        """The newest folder on the disk that this history of the run has; later ones did not verify."""
        steps = [step for step in self.paths.steps() if step <= self.progress.step]
        return self.paths.step(steps[-1]) if steps else None

    def check(self) -> None:
        """Raise what ends the run from outside: `Interrupted`, or `RunHeldError` where another worker has the run."""
        self.stop.check()
        self.bucket.check()

    def check_together(self) -> None:
        """The same for all ranks at the same place: what one is told of ends all. To be called by every rank."""
        if self.group.most(self.stop.requested) and not self.stop.requested:
            self.stop.request("what another process was told")
        self.check()

    def wants_save(self) -> bool:
        """Whether to save now: at the end, at the interval, or because somebody warned that the machine may go.

        The first rank decides.
        """
        wanted = self.group.first and self._wants_save()
        return self.group.most(wanted) > 0 if self.sharded else wanted

    def _wants_save(self) -> bool:
        if (reason := self.stop.take_save()) is not None:
            log.info("saving now: %s", reason)
            return True
        return self.finished or self.saving.due(self.progress.step, self.progress.saved_at)

    def report(self, phase: str, **facts: float) -> None:
        """Tell whoever watches the run, here and at the bucket, how it gets on."""
        self.heartbeat.beat(phase, step=self.progress.step, **facts)
        self.bucket.status(phase=phase, step=self.progress.step, **facts)

    def _wait(self) -> None:
        self.heartbeat.beat("save", step=self.progress.step)

    @property
    def parameter_names(self) -> dict[torch.Tensor, str]:
        return {parameter: name for name, parameter in self.task.model.named_parameters()}

    @property
    def _moments(self) -> torch.dtype:
        return MOMENT_TYPES[self.settings.training.moments]

    @property
    def finished(self) -> bool:
        return self.progress.stopped_early or self.progress.step >= self.settings.training.max_steps

    def save(self) -> None:
        """Begin a save of the state as it is; it ends behind the next step (`checkpoint.saver`).

        Raises what was wrong with an earlier one, as `TrainingDiverged` for weights that are not finite.
        """
        self.heartbeat.beat("save", step=self.progress.step)
        self.saving.save(self.snapshot)

    def snapshot(self) -> Snapshot:
        """Everything a checkpoint holds; the tensors are the live ones."""
        self.gradients.settle()  # after a step that was broken off
        self.progress.metrics_size = self.metrics.size
        self.progress.saved_at = self.progress.step
        trainable, frozen = split_frozen(self.task.model.named_parameters())
        return Snapshot(
            step=self.progress.step,
            tensors={MODEL: trainable, OPTIMIZER: optimizer_tensors(self.optimizer, self.parameter_names)},
            documents={
                STATE: asdict(self._state),
                **self._documents,
            },
            facts={**self._facts, "tracking_run_id": self.tracking.run_id},
            frozen=frozen,
        )

    @property
    def _state(self) -> State:
        group = self.group
        return State(self.progress, self.threads, group.device.type, self.task.averages, group.world)

    @cached_property
    def _documents(self) -> dict[str, Any]:
        """What never changes in a run: built once, because a save stops the training for as long."""
        config: Any = self.task.model.config
        shown = redact_values(self.settings.flat())
        return {SETTINGS: {"identity": self.identity, "resolved": shown}, CONFIG: config.to_dict()}

    @cached_property
    def _facts(self) -> dict[str, Any]:
        return {
            "settings_digest": self.settings.digest(),
            "base_model_digest": self.base_model_digest,
            "worker_version": wmtp_worker.__version__,
            "torch_version": torch.__version__,
        }

    def _inspect(self, step: int, tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Behind the loop, before a checkpoint is written: weights must be finite, and the metrics on the disk."""
        weights = [tensor for name, file in tensors.items() if logical_name(name) == MODEL for tensor in file.values()]
        if not all(map(_is_finite, weights)):
            raise self._diverged("the weights are not finite", step)
        self.metrics.sync()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Become what the checkpoint was, to the last bit.

        Raises `InputError` naming the setting that differs, and `CheckpointError` for content that makes no sense.
        """
        self._check_settings(checkpoint)
        state = checkpoint.document(STATE, State)
        if state.progress.step != checkpoint.manifest.step:
            raise checkpoint.malformed(f"{STATE} is of step {state.progress.step}")
        where = str(checkpoint.folder)
        self._read_weights(checkpoint)
        if checkpoint.manifest.kind == "trainable":
            log.warning("%s is an emergency save without the optimizer's state, which starts anew", where)
        elif self.sharded:
            read_optimizer(self.optimizer, self.parameter_names, checkpoint.pieces(OPTIMIZER), where, self._moments)
        else:
            load_optimizer(self.optimizer, self.parameter_names, checkpoint.tensors(OPTIMIZER), where, self._moments)
        self.progress = state.progress
        self.task.averages = state.weighting
        self.resumed_from = self.progress.step
        for what, before, now in (
            ("threads", state.threads, self.threads),
            ("processes", state.ranks, self.group.world),
            ("device", state.device, self.group.device.type),
            ("torch", checkpoint.manifest.torch_version, torch.__version__),
        ):
            if before != now:
                log.warning("%s was %s, is %s: the numbers may differ in their last bits", what, before, now)

    def _read_weights(self, checkpoint: Checkpoint) -> None:
        where = str(checkpoint.folder)
        if not self.sharded:
            load_tensors(self.task.model, checkpoint.model_tensors(), where)
            return
        # each rank reads the slices that it holds
        own = tensors(self.task.model)
        files = [checkpoint.pieces(name) for name in (MODEL, FROZEN) if checkpoint.has(name)]
        shapes = {name: shape for file in files for name, (shape, _) in file.specs().items()}
        check_shapes(own, shapes, where)
        for file in files:
            file.read_into({name: own[name] for name in file.specs()})

    def look_for_best(self) -> None:
        """A best model that is older than the checkpoint says counts as lost: the disk was full when it was written."""
        there = step_of(self.paths.best)
        if self.progress.best_loss is not None and (there is None or there < self.progress.best_step):
            what = "is not there" if there is None else f"is of step {there}"
            log.warning("%s %s instead of step %d: looking for it anew", self.paths.best, what, self.progress.best_step)
            self.progress.best_loss, self.progress.without_improvement = None, 0

    def _check_settings(self, checkpoint: Checkpoint) -> None:
        saved = UNNAMED | checkpoint.document(SETTINGS, dict[str, dict[str, Any]]).get("identity", {})
        stages = {True: "a policy", False: "a value model"}
        trained, wanted = POLICY_MARK in saved, POLICY_MARK in self.identity
        if trained != wanted:
            raise InputError(
                f"the run {self.paths.run} trained {stages[trained]}, and is to train {stages[wanted]}",
                where=str(checkpoint.folder),
                fix="choose another --run-name",
            )
        accepted = set(self.settings.run.accept_changes)
        differing = [
            f"{key}: {saved.get(key)!r} in the checkpoint, {self.identity.get(key)!r} now{self._name_of(key)}"
            for key in sorted(saved.keys() | self.identity.keys())
            if saved.get(key) != self.identity.get(key) and key not in accepted
        ]
        if differing:
            raise InputError(
                "the checkpoint was made with other settings: " + "; ".join(differing),
                where=str(checkpoint.folder),
                fix="set them back, choose another --run-name, start anew with --resume never, "
                "or list the keys in run.accept_changes",
            )

    def _name_of(self, key: str) -> str:
        """What is compared by digest has a name too, which says more to a person."""
        flat = self.settings.flat()
        by_digest = key in flat and key not in self.settings.identity() and key in self.identity
        return f" ({redact(str(flat[key]))})" if by_digest else ""

    def diverged(self, what: str) -> TrainingDiverged:
        """The error that ends the run, naming the checkpoint it stands on: all that was saved is finite."""
        with suppress(WorkerError):  # this reason comes first
            self.saving.finish()
        return self._diverged(what, self.progress.step)

    def _diverged(self, what: str, step: int) -> TrainingDiverged:
        good = self.newest_checkpoint or "there is none"
        section = "value" if self.settings.run.stage == "value" else "training"
        return TrainingDiverged(
            f"{what} after step {step}; the last good checkpoint: {good}",
            where=f"run {self.paths.run}",
            fix=f"lower {section}.lr, lengthen training.warmup_steps or set training.grad_clip, "
            "under another --run-name",
        )

    def export(self, path: Path, weights: Mapping[str, torch.Tensor]) -> None:
        """Write `final.pt`, or begin to write `best_model.pt` as `save` does; whole or not at all. Only the first rank
        does. `weights`: those of `whole_weights`.
        """
        if not self.group.first:
            return
        progress = self.progress
        facts = {
            "format_version": 1,
            "run": self.paths.run,
            "step": progress.step,
            "validation": progress.validation,
            "identity": self.identity,
            "config": self._documents[CONFIG],
        }
        if path == self.paths.best:
            self.saving.export(path, progress.step, weights, facts)
        else:
            save_weights(path, weights, facts)

    def whole_weights(self) -> dict[str, torch.Tensor]:
        """Every parameter by name. Shards are put together in the first rank's host memory, one after the other: every
        rank must call this then, and the others have nothing.
        """
        if not self.sharded:
            return tensors(self.task.model)
        self.gradients.settle()
        whole = {}
        for name, parameter in self.task.model.named_parameters():
            tensor = gather_whole(parameter)
            if self.group.first:
                whole[name] = tensor.to("cpu")
        return whole


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether all of its numbers are, without a copy of it."""
    return tensor.numel() == 0 or bool(torch.stack(tensor.aminmax()).isfinite().all())


def seed_pass(seed: int, step: int, number: int) -> None:
    """Seed torch on every device for a step's micro-batch, so that dropout and its like are the same after a resume,
    and on whichever rank it comes to."""
    torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{step}/{number}".encode()).digest()[:8], "big"))
