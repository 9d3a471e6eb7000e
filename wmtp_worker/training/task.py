"""What a stage of a run trains, as the loop and the checkpoints see it.

The policy (`policy.PolicyTask`, stage 2) and the value model (`values.ValueTask`, stage 1) are such tasks. What they
have in common, the loop does: rows, learning rate, clipping, the step, saving, stopping early.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from wmtp_worker.data.packing import Batch
from wmtp_worker.data.sampler import PackedSampler
from wmtp_worker.weighting.statistics import MovingAverage

# adds the gradient of one micro-batch to the parameters' `.grad`
Backward = Callable[[], None]


class Rows(Protocol):
    """Training data: an endless stream of rows, and the batch that some of them make."""

    @property
    def sampler(self) -> PackedSampler: ...

    def batch(self, rows: list[list[int]]) -> Batch: ...


class Result(Protocol):
    """The numbers of one validation; `loss` is the one that the best model is chosen by. `str()` is a log line."""

    @property
    def loss(self) -> float: ...

    def to_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Step:
    """What a task has to say of an optimizer step: what goes into `metrics.jsonl`, and words for the log."""

    metrics: Mapping[str, Any]
    note: str = ""


class Task(Protocol):
    """A model, its data and its objective.

    `model.config` and the parameters by name are what a checkpoint and `final.pt` hold of it; what needs no gradient is
    kept once a run. `averages` is all else that it remembers from step to step.
    """

    @property
    def model(self) -> nn.Module: ...

    @property
    def data(self) -> Rows: ...

    averages: Mapping[str, MovingAverage]

    def begin(self, step: int, batches: Sequence[Batch]) -> list[Backward]:
        """Look at a whole step; returns one `Backward` for each micro-batch, to be called in order.

        Every micro-batch is divided by the same counts, so that accumulation equals one large batch. Each rank is given
        the whole step, and calls those of its own share.
        """
        ...

    def loss(self) -> float:
        """Of the step, after its last micro-batch: of all ranks. To be called once, by every rank."""
        ...

    def end(self, counted: bool) -> Step:
        """Close the step, once its loss is known to be finite. To be called by every rank.

        `counted`: with histograms, which are long.
        """
        ...

    def validate(self, between: Callable[[], None]) -> Result:
        """Judge the model as it is; `between` is called equally often by every rank and may raise to stop."""
        ...

    def record(self, step: int) -> None:
        """After a validation: write down, beside the metrics, what people want to look at. Changes nothing else."""
        ...

    def __str__(self) -> str:
        """What it is made of, for the log."""
        ...
