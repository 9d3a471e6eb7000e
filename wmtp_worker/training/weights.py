"""The weights of a step's tokens: a family, a control, the normalisation, and what there is to log about them."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from typing import Any, Self

import torch

from wmtp_worker.data.packing import IGNORE, Batch
from wmtp_worker.errors import InputError
from wmtp_worker.settings import WeightingSettings
from wmtp_worker.training.families import (
    VALUE,
    Memory,
    after_the_policy,
    before_the_policy,
    is_exponential,
)
from wmtp_worker.training.loss import Head, Weigh
from wmtp_worker.weighting import random_matched, shuffled
from wmtp_worker.weighting.normalise import normalise
from wmtp_worker.weighting.spans import sequences
from wmtp_worker.weighting.statistics import Moments
from wmtp_worker.weighting.summary import Summary, clipped, histogram


@dataclass
class _Told:
    """What a rank has seen of a step's weights."""

    weights: Summary = field(default_factory=Summary)
    clipped: Moments = field(default_factory=Moments)
    raw_clipped: Moments = field(default_factory=Moments)
    histogram: list[int] = field(default_factory=list)
    moments: dict[str, Moments] = field(default_factory=dict)

    def __add__(self, other: "_Told") -> "_Told":
        names = [*self.moments, *(name for name in other.moments if name not in self.moments)]
        none = Moments()
        return _Told(
            self.weights + other.weights,
            self.clipped + other.clipped,
            self.raw_clipped + other.raw_clipped,
            [sum(counts) for counts in zip_longest(self.histogram, other.histogram, fillvalue=0)],
            {name: self.moments.get(name, none) + other.moments.get(name, none) for name in names},
        )


class Weighter:
    """Weighs the tokens of one optimizer step after the other: `begin`, each `Weigh` for its micro-batch, `end`.

    What is known before the policy runs (uniform, critic, grpo without KL) is whitened and normalised over the whole
    step, all heads together, so accumulation equals one large batch. Families that look at the policy's losses (rho1,
    gradient, grpo with KL) are weighed and normalised for each head and micro-batch, from the forward pass that the
    head is trained by. The critic is in between where its values are learned beside the policy: each micro-batch is
    whitened and normalised by itself, all heads together, once it has its values. Controls draw from (seed, step,
    micro-batch, head) alone: `memory.averages` is all there is to save.

    Several ranks are each told of the whole step, and ask for the weights of their own micro-batches.
    """

    def __init__(
        self,
        settings: WeightingSettings,
        seed: int,
        gather: Callable[[Any], list[Any]] = lambda mine: [mine],
    ) -> None:
        """`gather`: what each rank brings, by rank, on every rank."""
        self._settings = settings
        self._seed = seed
        self._gather = gather
        self.memory = Memory(settings.ema_decay, settings.warmup)
        self._chance = torch.Generator()
        # of this step: weights before and after the normalisation, and which are of labelled positions
        self._given: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def aside(self) -> Self:
        """One that weighs as this one would now; what it weighs leaves no trace here."""
        other = type(self)(self._settings, self._seed)
        other.memory.averages = dict(self.memory.averages)
        return other

    def begin(self, step: int, batches: Sequence[Batch], targets: Sequence[torch.Tensor]) -> list[Weigh]:
        """One `Weigh` for each micro-batch of a step, whose heads it must be asked about in their order.

        `targets`: int64 [batch, time, heads] each, from `mtp_labels`. Raises `InputError` where all weights are 0, here
        or when a `Weigh` is called.
        """
        self._given = []
        if self._settings.looks_at_losses:
            return [partial(self._while_it_runs, step, number) for number in range(len(batches))]
        if self._settings.learns_values:
            return [self._once_judged(step, number, target != IGNORE) for number, target in enumerate(targets)]
        self._draw_from(step)
        masks = [target != IGNORE for target in targets]
        raw = before_the_policy(self._settings, batches, masks, self.memory)
        raw = [
            self._control(one, mask, batch.segment_ids) for one, mask, batch in zip(raw, masks, batches, strict=True)
        ]
        weights = self._normalised(torch.cat(raw), torch.cat(masks)).split([len(one) for one in raw])
        return [_known(one) for one in weights]

    def end(self, counted: bool = False) -> dict[str, Any]:
        """Close the step: the averages take it in. Returns what there is to log about its weights, numbers by name.

        `counted`: with their `weight_histogram` (`weighting.bins`), where they differ at all.
        """
        settings = self._settings
        told = self._told(counted)
        if settings.looks_at_losses or settings.learns_values:  # else every rank has seen the whole step
            told = sum(self._gather(told), _Told())
        facts: dict[str, Any] = told.weights.facts()
        if counted and facts.get("weight_std"):
            facts["weight_histogram"] = told.histogram
        if settings.normalise == "mean1_clip":
            facts["weight_clip_ratio"] = told.clipped.mean
        if is_exponential(settings):
            facts["advantage_clip_ratio"] = told.raw_clipped.mean
        for name, moments in told.moments.items():
            facts |= {f"{name}_mean": moments.mean, f"{name}_std": moments.std}
        self.memory.moments = told.moments
        self.memory.close_step()
        for name, average in self.memory.averages.items():
            facts |= {f"{name}_ema_mean": average.mean, f"{name}_ema_std": average.std}
        return facts

    def _told(self, counted: bool) -> _Told:
        raw, weights, labelled = (
            torch.cat([tensor.flatten() for tensor in tensors]) for tensors in zip(*self._given, strict=True)
        )
        low, high = self._settings.min, self._settings.max
        return _Told(
            Summary.of(weights, labelled),
            clipped(weights, labelled, low, high),
            clipped(raw, labelled, low, high),
            histogram(weights, labelled) if counted else [],
            self.memory.moments,
        )

    def _draw_from(self, *place: int) -> None:
        """Let controls draw what belongs to this place of the run, whoever asks."""
        text = "/".join(map(str, ("weights", self._seed, *place)))
        self._chance.manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]))

    def _while_it_runs(self, step: int, number: int, head: Head) -> torch.Tensor:
        losses = head.losses
        if not torch.isfinite(losses).all():
            return torch.ones_like(losses)  # the run has diverged: its loss will tell
        raw = after_the_policy(self._settings, head, self.memory)
        labelled = (head.targets != IGNORE)[..., None]
        self._draw_from(step, number, head.number)
        raw = self._control(raw, labelled, head.batch.segment_ids)
        return self._normalised(raw, labelled)[..., 0]

    def _once_judged(self, step: int, number: int, mask: torch.Tensor) -> Weigh:
        """All heads' weights are made when the first one asks."""
        made: list[torch.Tensor] = []

        def weigh(head: Head) -> torch.Tensor:
            if not made:
                made.append(self._judged(step, number, head.batch, mask.to(head.targets.device)))
            return made[0][..., head.number - 1]

        return weigh

    def _judged(self, step: int, number: int, batch: Batch, mask: torch.Tensor) -> torch.Tensor:
        if not torch.isfinite(batch.columns[VALUE]).all():
            ones = torch.ones_like(mask, dtype=torch.float32)  # as above
            self._given.append((ones, ones, mask))
            return ones
        (raw,) = before_the_policy(self._settings, [batch], [mask], self.memory)
        self._draw_from(step, number)
        return self._normalised(self._control(raw, mask, batch.segment_ids), mask)

    def _control(self, raw: torch.Tensor, labelled: torch.Tensor, segment_ids: torch.Tensor) -> torch.Tensor:
        if self._settings.control == "shuffled":
            return shuffled.weights(raw, labelled, sequences(segment_ids), self._chance)
        if self._settings.control == "random_matched":
            return random_matched.weights(raw, labelled, self._chance)
        return raw

    def _normalised(self, raw: torch.Tensor, labelled: torch.Tensor) -> torch.Tensor:
        settings = self._settings
        try:
            weights = normalise(raw, labelled, settings.normalise, settings.min, settings.max)
        except ValueError as error:
            raise InputError(
                f"nothing could be learned: {error}",
                where=f"weighting.family={settings.family}",
                fix="raise weighting.min, or the family's beta, temperature or share",
            ) from None
        self._given.append((raw, weights, labelled))
        return weights


def _known(weights: torch.Tensor) -> Weigh:
    return lambda head: weights[..., head.number - 1].to(head.targets.device)
