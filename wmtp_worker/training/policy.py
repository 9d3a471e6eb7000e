"""Stage 2 as a task: the policy learns the weighted multi-token prediction loss."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from wmtp_worker.data.dataset import Dataset
from wmtp_worker.data.packing import IGNORE, Batch
from wmtp_worker.model.mtp import MTPForCausalLM
from wmtp_worker.settings import Settings
from wmtp_worker.training.auxiliary import AuxiliaryValues
from wmtp_worker.training.group import Group
from wmtp_worker.training.linear_cross_entropy import LossForm
from wmtp_worker.training.loss import Weigh, head_losses_backward, mtp_labels
from wmtp_worker.training.probe import Probe
from wmtp_worker.training.task import Backward, Step
from wmtp_worker.training.validation import Validation, validate
from wmtp_worker.training.weights import Weighter
from wmtp_worker.weighting.statistics import MovingAverage


class PolicyTask:
    """The policy, on its device; `data` has the columns that the weighting family reads."""

    def __init__(
        self,
        settings: Settings,
        model: MTPForCausalLM,
        group: Group,
        data: Dataset,
        validation: Dataset,
        probe: Probe,
        values: AuxiliaryValues | None = None,
    ) -> None:
        """`values`: what learns beside the policy, where something does."""
        self.model = model
        self.data = data
        self._validation = validation
        self._probe = probe
        self._values = values
        self._settings = settings
        self._group = group
        self._weighter = Weighter(settings.weighting, settings.run.seed, group.ranks.gather)
        self._form = LossForm(settings.training.label_smoothing, settings.training.z_loss)
        self._losses = torch.zeros(2, model.heads, device=group.device)

    @property
    def averages(self) -> Mapping[str, MovingAverage]:
        """What the weighting remembers."""
        return self._weighter.memory.averages

    @averages.setter
    def averages(self, averages: Mapping[str, MovingAverage]) -> None:
        self._weighter.memory.averages = averages

    def begin(self, step: int, batches: Sequence[Batch]) -> list[Backward]:
        targets = [mtp_labels(batch.labels, batch.segment_ids, self.model.heads) for batch in batches]
        counts = torch.stack([(target != IGNORE).sum((0, 1)) for target in targets]).sum(0).clamp(min=1)
        counts = counts.to(self._group.device, torch.float32)
        weighs = self._weighter.begin(step, batches, targets)
        if self._values is not None:
            self._values.begin(batches)
        self._losses = torch.zeros(2, self.model.heads, device=self._group.device)
        return [
            partial(self._backward, batch, target, weigh, counts)
            for batch, target, weigh in zip(batches, targets, weighs, strict=True)
        ]

    def _backward(self, batch: Batch, targets: torch.Tensor, weigh: Weigh, counts: torch.Tensor) -> None:
        batch, targets = batch.to(self._group.device), targets.to(self._group.device)
        precision, beside = self._settings.training.precision, None if self._values is None else self._values.learn
        self._losses += head_losses_backward(self.model, batch, targets, weigh, counts, precision, self._form, beside)

    def loss(self) -> float:
        self._losses = self._group.sum(self._losses)
        head_loss: list[float] = self._losses[0].tolist()
        return sum(head_loss) / self.model.heads

    def end(self, counted: bool) -> Step:
        head_loss, unweighted = self._losses.tolist()
        weighting = self._weighter.end(counted)
        note = ""
        if weighting.get("weight_std"):
            note = f"  weights ±{weighting['weight_std']:.2f} entropy {weighting['weight_entropy']:.3f}"
        losses = {
            "loss": sum(head_loss) / self.model.heads,
            "head_loss": head_loss,
            "unweighted_loss": sum(unweighted) / self.model.heads,
            "unweighted_head_loss": unweighted,
        }
        judged = {} if self._values is None else self._values.end()
        return Step(losses | weighting | judged, note)

    def validate(self, between: Callable[[], None]) -> Validation:
        training, evaluation = self._settings.training, self._settings.evaluation
        batches = self._validation.epoch(training.micro_batch_size, evaluation.max_batches)
        return validate(self.model, batches, self._group, training.precision, between)

    def record(self, step: int) -> None:
        self._probe.record(step, self._weighter)

    def __str__(self) -> str:
        samples = f"{len(self.data.samples)} training and {len(self._validation.samples)} validation samples"
        return f"{self.model.heads} heads, {samples}"
