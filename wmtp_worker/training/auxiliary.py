"""The value head that is trained on beside the policy: L + c · L_value, on the hidden states of the same forward pass.

The objective is that of `objective`, of what a micro-batch has: its solutions' states, or those pairs of a correct and
an incorrect solution of one problem that lie in it. c is `weighting.critic.auxiliary`. As where actor and critic share
a network (Schulman et al. 2017, "PPO", eq. 9), the gradient flows on into the trunk. What the head says is what the
micro-batch is weighed by: before this step, and without gradient.
"""

import dataclasses
import logging
from collections.abc import Sequence

import torch

from wmtp_worker.data.dataset import Dataset
from wmtp_worker.data.packing import IGNORE, Batch
from wmtp_worker.errors import InputError
from wmtp_worker.host.device import deterministic_backward
from wmtp_worker.model.mtp import MTPForCausalLM, TrunkOutput
from wmtp_worker.settings import Settings
from wmtp_worker.training.families import CORRECT, PROBLEM, REWARD, VALUE
from wmtp_worker.training.group import Group
from wmtp_worker.training.objective import Objective, bradley_terry, ranked_right, states
from wmtp_worker.training.quality import explained_variance
from wmtp_worker.weighting.spans import last_tokens
from wmtp_worker.weighting.statistics import Moments

log = logging.getLogger(__name__)

_LOOKED_AT = 1000  # micro-batches


def check_data(settings: Settings, data: Dataset) -> None:
    """Raise `InputError` where training samples teach no values; with pairs, warn where they are rare.

    What lies in which micro-batch is known before the first step.
    """
    label = "let execution label solutions and make wrong ones: wmtp data label SRC DST --mutations 4"
    correct = sum(sample.reward == 1 for sample in data.samples)
    if correct in (0, len(data.samples)):
        kind = "correct" if correct else "incorrect"
        where = f"{len(data.samples)} training samples"
        raise InputError(f"every solution is {kind}: values cannot be learned", where=where, fix=label)
    if settings.value.objective != "pairwise":
        return
    size, rows = settings.training.micro_batch_size, data.sampler.rows(0)
    starts = range(0, len(rows), size)[:_LOOKED_AT]
    found = 0
    for start in starts:
        some = [data.samples[index] for row in rows[start : start + size] for index in row]
        lengths = torch.tensor([len(sample.ids) - sample.prompt_length for sample in some])
        problems, labels = (torch.tensor([getattr(sample, of) for sample in some]) for of in ("problem", "reward"))
        found += len(pairs_among(problems, labels, lengths, settings.data.pairs.length_share)[0])
    instead = "set value.objective=lambda_return, which needs no pairs, or a larger training.micro_batch_size"
    if not found:
        raise InputError(
            "no micro-batch has a correct and an incorrect solution of one problem: values cannot be learned",
            where=f"{len(starts)} micro-batches of {size} rows",
            fix=instead,
        )
    often = found / len(starts) * settings.training.accumulation
    log.log(
        logging.WARNING if often < 1 else logging.INFO,
        "%.2g pairs a step to learn values from%s",
        often,
        f"; {instead}" if often < 1 else "",
    )


def pairs_among(
    problems: torch.Tensor, correct: torch.Tensor, lengths: torch.Tensor, share: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """All pairs of a correct and an incorrect solution of one problem, as places: int64 [pairs] both.

    Their lengths differ by at most `share` of the longer one. `problems`, `correct` (1 or 0), `lengths`: [solutions].
    """
    pair = (problems[:, None] == problems) & (correct[:, None] == 1) & (correct == 0)
    pair &= (lengths[:, None] - lengths).abs() <= share * torch.maximum(lengths[:, None], lengths)
    first, second = pair.nonzero().unbind(-1)
    return first, second


class AuxiliaryValues:
    """Of one optimizer step after the other: `begin`, `learn` for each micro-batch of this rank, `end`.

    The batches have the columns `CORRECT` and `PROBLEM`.
    """

    def __init__(self, settings: Settings, model: MTPForCausalLM, group: Group) -> None:
        assert model.value_head is not None
        self._head = model.value_head
        self._coefficient = settings.weighting.critic.auxiliary
        self._rewards = settings.weighting.critic.rewards
        self._objective = Objective.of(settings)
        self._length_share = settings.data.pairs.length_share
        self._gather = group.ranks.gather
        self._count = 1
        self._told: dict[str, Moments] = {}

    def begin(self, batches: Sequence[Batch]) -> None:
        """Look at a whole step, that of all ranks: every micro-batch is divided by the same count."""
        if self._objective.pairwise:
            count = sum(len(self._pairs(batch)[0]) for batch in batches)
        else:
            count = sum(int(states(batch).sum()) for batch in batches)
        self._count = max(count, 1)
        self._told = {}

    def learn(self, trunk: TrunkOutput, batch: Batch) -> Batch:
        """Add the gradient of c · L_value to the head's parameters and to `trunk.hidden`, a leaf.

        Returns the batch with what the head says of its tokens, for `weights`.
        """
        values = self._head(trunk.hidden)
        losses = self._losses(values, batch)
        # also where there is no pair: every rank has a gradient, if only of zeros
        with deterministic_backward():
            (losses.sum() * (self._coefficient / self._count)).backward()
        values = values.detach()
        self._note("loss", losses.detach())
        missed, returns = self._objective.explained(values, batch, CORRECT)
        self._add(token_errors=missed, token_targets=returns)
        ends = last_tokens(batch.segment_ids)
        correct = batch.columns[CORRECT][ends]
        self._note("errors", correct - self._objective.chance(values[ends]))
        self._note("targets", correct)
        return self._with_values(batch, values)

    @torch.no_grad()
    def judge(self, trunk: TrunkOutput, batch: Batch) -> Batch:
        """What `learn` returns, without learning."""
        return self._with_values(batch, self._head(trunk.hidden))

    def end(self) -> dict[str, float]:
        """What there is to log of the step, of all ranks, named as in stage 1. To be called by every rank.

        Of its own micro-batches, before the step. Without `value_loss` where it had no pair.
        """
        ranks = self._gather(self._told)
        told = {name: sum((one[name] for one in ranks), Moments()) for name in self._told}
        facts: dict[str, float] = {}
        if told["loss"].count:
            facts["value_loss"] = told["loss"].mean
        if self._objective.pairwise:
            facts["value_pairs"] = told["loss"].count
            if told["loss"].count:
                facts["pairwise_accuracy"] = told["right"].total / told["loss"].count
        facts["explained_variance"] = explained_variance(told["errors"], told["targets"])
        facts["token_explained_variance"] = explained_variance(told["token_errors"], told["token_targets"])
        return facts

    def _losses(self, values: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Of each state, or of each pair."""
        if not self._objective.pairwise:
            return self._objective.errors(values, batch, CORRECT)
        ends = values[last_tokens(batch.segment_ids)]
        correct, incorrect = (ends[places] for places in self._pairs(batch))
        self._note("right", ranked_right(correct, incorrect)[None])
        return bradley_terry(correct, incorrect)

    def _pairs(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Places among the last tokens of the micro-batch."""
        ends = last_tokens(batch.segment_ids)
        labelled = (batch.labels != IGNORE).flatten().cumsum(0)[ends.flatten()]
        lengths = labelled.diff(prepend=labelled.new_zeros(1))
        return pairs_among(batch.columns[PROBLEM][ends], batch.columns[CORRECT][ends], lengths, self._length_share)

    def _with_values(self, batch: Batch, values: torch.Tensor) -> Batch:
        columns = {**batch.columns, VALUE: values}
        if self._rewards == "value":
            columns[REWARD] = values.where(last_tokens(batch.segment_ids), 0)
        return dataclasses.replace(batch, columns=columns)

    def _note(self, name: str, values: torch.Tensor) -> None:
        self._add(**{name: Moments.of(values, torch.ones_like(values, dtype=torch.bool))})

    def _add(self, **found: Moments) -> None:
        self._told |= {name: self._told.get(name, Moments()) + moments for name, moments in found.items()}
