"""Stage 1 as a task: a value model learns to tell correct from incorrect solutions (`objective`)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from wmtp_worker.data.dataset import Dataset
from wmtp_worker.data.packing import Batch, pack
from wmtp_worker.data.pairs import Pair, PairRows
from wmtp_worker.errors import InputError
from wmtp_worker.host.device import deterministic_backward
from wmtp_worker.model.mtp import packed_attention_mask
from wmtp_worker.model.value import ValueModel
from wmtp_worker.settings import Settings
from wmtp_worker.training.families import REWARD
from wmtp_worker.training.group import Group
from wmtp_worker.training.loss import autocast
from wmtp_worker.training.objective import Objective, bradley_terry, ranked_right, states
from wmtp_worker.training.quality import Quality, explained_variance, quality, reliability
from wmtp_worker.training.task import Backward, Step
from wmtp_worker.weighting.spans import last_tokens
from wmtp_worker.weighting.statistics import Moments, MovingAverage


@dataclass(frozen=True)
class ValueReport:
    """Numbers of one validation. `value_loss`: the objective; the others are those of `quality.Quality`.

    `token_explained_variance`: of the return, by the values of all states: what the weights of a critic follow from.
    """

    value_loss: float
    pairwise_accuracy: float
    explained_variance: float
    token_explained_variance: float
    calibration: float
    pairs: int
    samples: int
    reliability: list[list[float]]  # see `quality.reliability`

    @property
    def loss(self) -> float:
        return self.value_loss

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"value loss {self.value_loss:.4f}  pairwise accuracy {self.pairwise_accuracy:.1%}  "
            f"explained variance {self.explained_variance:.3f}, of all tokens {self.token_explained_variance:.3f}  "
            f"calibration error {self.calibration:.3f}"
        )


class Exam:
    """Labelled samples for the validation: always the same batches, those of pairs first.

    `pairs` are of places in `order`: the samples one after the other as the batches have them.
    """

    def __init__(self, settings: Settings, data: Dataset, pairs: Sequence[Pair]) -> None:
        """`pairs`: of `data.samples`. Raises `InputError` where evaluation.max_batches leaves no pair whole."""
        # a limit shall cut between pairs, of problems from everywhere
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(settings.run.seed % (1 << 63)))
        first = [place for number in order.tolist() for place in (pairs[number].correct, pairs[number].incorrect)]
        places = list(dict.fromkeys([*first, *range(len(data.samples))]))
        lengths = [len(sample.ids) for sample in data.samples]
        rows = pack(places, lengths, data.sequence_length) if settings.data.packing else [[place] for place in places]
        size, most = settings.training.micro_batch_size, settings.evaluation.max_batches
        self._rows = [rows[start : start + size] for start in range(0, len(rows), size)][: most or None]
        self._data = data
        taken = [place for some in self._rows for row in some for place in row]
        at = {place: number for number, place in enumerate(taken)}
        whole = [pair for pair in pairs if pair.correct in at and pair.incorrect in at]
        self.pairs = [Pair(at[pair.correct], at[pair.incorrect]) for pair in whole]
        self.correct = torch.tensor([data.samples[place].reward for place in taken])
        if not self.pairs:
            raise InputError(
                f"evaluation.max_batches={most} batches of {size} rows hold no pair of solutions",
                where=settings.sources["evaluation.max_batches"],
                fix="set a larger one, or 0 for the whole validation split",
            )

    def __iter__(self) -> Any:
        return (self._data.batch(rows) for rows in self._rows)


class ValueTask:
    """The value model, on its device.

    `data`: with the objective pairwise `PairRows`, else samples with the column "reward", as those of `exam` have it.
    """

    def __init__(
        self, settings: Settings, model: ValueModel, group: Group, data: PairRows | Dataset, exam: Exam
    ) -> None:
        self.model = model
        self.data = data
        self.averages: Mapping[str, MovingAverage] = {}
        self._exam = exam
        self._objective = Objective.of(settings)
        self._precision = settings.training.precision
        self._group = group
        self._sums = torch.zeros(2, device=group.device)
        self._count = 1

    def begin(self, step: int, batches: Sequence[Batch]) -> list[Backward]:
        pairwise = self._objective.pairwise
        counted = (last_tokens(batch.segment_ids) if pairwise else states(batch) for batch in batches)
        total = sum(int(mask.sum()) for mask in counted)
        self._count = max(total // 2 if pairwise else total, 1)
        self._sums = torch.zeros(2, device=self._group.device)
        learn = self._rank if pairwise else self._regress
        return [partial(learn, batch) for batch in batches]

    def _rank(self, batch: Batch) -> None:
        batch = batch.to(self._group.device)
        with autocast(self._group.device, self._precision):
            values = self._values(batch)
        # the first half of the rows are the correct ones
        correct, incorrect = values[last_tokens(batch.segment_ids)].chunk(2)
        losses = bradley_terry(correct, incorrect)
        with deterministic_backward():
            (losses.sum() / self._count).backward()
        self._sums += torch.stack([losses.detach().sum(), ranked_right(correct, incorrect)])

    def _regress(self, batch: Batch) -> None:
        batch = batch.to(self._group.device)
        with autocast(self._group.device, self._precision):
            values = self._values(batch)
        errors = self._objective.errors(values, batch, REWARD)
        with deterministic_backward():
            (errors.sum() / self._count).backward()
        self._sums[0] += errors.detach().sum()

    def _values(self, batch: Batch) -> torch.Tensor:
        values: torch.Tensor = self.model(batch.input_ids, batch.position_ids, packed_attention_mask(batch.segment_ids))
        return values

    def loss(self) -> float:
        self._sums = self._group.sum(self._sums)
        return float(self._sums[0]) / self._count

    def end(self, counted: bool) -> Step:
        said = {"value_loss": float(self._sums[0]) / self._count}
        if not self._objective.pairwise:
            return Step(said)
        right = float(self._sums[1]) / self._count
        return Step(said | {"pairwise_accuracy": right}, f"  pairwise accuracy {right:.1%}")

    def record(self, step: int) -> None:
        """Its numbers say it all."""

    @torch.no_grad()
    def validate(self, between: Callable[[], None]) -> ValueReport:
        ends: list[torch.Tensor] = []
        loss, count = 0.0, 0
        errors, targets = Moments(), Moments()
        self.model.eval()
        try:
            for batch in self._exam:
                between()
                batch = batch.to(self._group.device)
                with autocast(self._group.device, self._precision):
                    values = self._values(batch)
                ends.append(values[last_tokens(batch.segment_ids)].cpu())
                missed, returns = self._objective.explained(values, batch, REWARD)
                errors, targets = errors + missed, targets + returns
                if not self._objective.pairwise:
                    squares = self._objective.errors(values, batch, REWARD)
                    loss, count = loss + float(squares.sum()), count + len(squares)
        finally:
            self.model.train()
        judged, pairs = torch.cat(ends), self._exam.pairs
        chance = self._objective.chance(judged)
        if self._objective.pairwise:
            correct, incorrect = (judged[[getattr(pair, side) for pair in pairs]] for side in ("correct", "incorrect"))
            loss, count = float(bradley_terry(correct.double(), incorrect.double()).sum()), len(pairs)
        found: Quality = quality(judged, chance, self._exam.correct, pairs)
        return ValueReport(
            value_loss=loss / count,
            pairwise_accuracy=found.pairwise_accuracy,
            explained_variance=found.explained_variance,
            token_explained_variance=explained_variance(errors, targets),
            calibration=found.calibration,
            pairs=len(pairs),
            samples=len(judged),
            reliability=reliability(chance, self._exam.correct),
        )

    def __str__(self) -> str:
        what = f"{len(self.data)} pairs" if isinstance(self.data, PairRows) else f"{len(self.data.samples)} samples"
        return f"{what} to learn from, {len(self._exam.correct)} samples and {len(self._exam.pairs)} pairs to validate"
