"""The weights of a step's tokens: a family, a control, the normalisation, and what there is to log about them."""

import hashlib
from collections.abc import Sequence
from typing import Any, Self

import torch

from wmtp_worker.data.packing import IGNORE, Batch
from wmtp_worker.errors import InputError
from wmtp_worker.settings import WeightingSettings
from wmtp_worker.training.families import (
    Memory,
    after_the_policy,
    before_the_policy,
    is_exponential,
    looks_at_losses,
)
from wmtp_worker.training.loss import Head, Weigh
from wmtp_worker.weighting import random_matched, shuffled
from wmtp_worker.weighting.normalise import normalise
from wmtp_worker.weighting.spans import sequences
from wmtp_worker.weighting.summary import clipped_share, histogram, summarise


class Weighter:
    """Weighs the tokens of one optimizer step after the other: `begin`, each `Weigh` for its micro-batch, `end`.

    What is known before the policy runs (uniform, critic, grpo without KL) is whitened and normalised over the whole
    step, all heads together, so accumulation equals one large batch. Families that look at the policy's losses (rho1,
    gradient, grpo with KL) are weighed and normalised for each head and micro-batch, from the forward pass that the
    head is trained by. Controls draw from (seed, step) alone: `memory.averages` is all there is to save.
    """

    def __init__(self, settings: WeightingSettings, seed: int) -> None:
        self._settings = settings
        self._seed = seed
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
        self._chance.manual_seed(int.from_bytes(hashlib.sha256(f"weights/{self._seed}/{step}".encode()).digest()[:8]))
        if looks_at_losses(self._settings):
            return [self._while_it_runs] * len(batches)
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
        raw, weights, labelled = (
            torch.cat([tensor.flatten() for tensor in tensors]) for tensors in zip(*self._given, strict=True)
        )
        facts: dict[str, Any] = summarise(weights, labelled)
        if counted and facts.get("weight_std"):
            facts["weight_histogram"] = histogram(weights, labelled)
        if settings.normalise == "mean1_clip":
            facts["weight_clip_ratio"] = clipped_share(weights, labelled, settings.min, settings.max)
        if is_exponential(settings):
            facts["advantage_clip_ratio"] = clipped_share(raw, labelled, settings.min, settings.max)
        for name, moments in self.memory.moments.items():
            facts |= {f"{name}_mean": moments.mean, f"{name}_std": moments.std}
        self.memory.close_step()
        for name, average in self.memory.averages.items():
            facts |= {f"{name}_ema_mean": average.mean, f"{name}_ema_std": average.std}
        return facts

    def _while_it_runs(self, head: Head) -> torch.Tensor:
        losses = head.losses
        if not torch.isfinite(losses).all():
            return torch.ones_like(losses)  # the run has diverged: its loss will tell
        raw = after_the_policy(self._settings, head, self.memory)
        labelled = (head.targets != IGNORE)[..., None]
        raw = self._control(raw, labelled, head.batch.segment_ids)
        return self._normalised(raw, labelled)[..., 0]

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
