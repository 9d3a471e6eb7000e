"""Which family of `weighting/` is called with what: raw weights, before a control and the normalisation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from wmtp_worker.data.packing import IGNORE, Batch
from wmtp_worker.settings import WeightingSettings
from wmtp_worker.training.loss import Head
from wmtp_worker.weighting import critic, gradient, grpo, rho1_tokenskip, rho1_weighted, uniform
from wmtp_worker.weighting.spans import ahead, sequences
from wmtp_worker.weighting.statistics import Moments, MovingAverage, whiten

# columns of a batch (`data.packing.Batch.columns`)
REFERENCE_LOSS, VALUE, REWARD, ADVANTAGE = "reference_loss", "value", "reward", "advantage"
# for values that are learned beside the policy: 1 or 0 at the last token; the problem's number
CORRECT, PROBLEM = "correct", "problem"


@dataclass
class Memory:
    """Statistics by name: moving averages over the steps so far, and moments of the one under way.

    The averages are all that a family remembers from one step to the next.
    """

    decay: float
    warmup: int
    averages: Mapping[str, MovingAverage] = field(default_factory=dict)
    moments: dict[str, Moments] = field(default_factory=dict)
    averaged: set[str] = field(default_factory=set)

    def note(self, name: str, moments: Moments) -> None:
        """Add what a micro-batch has to the step under way, for the log."""
        self.moments[name] = self.moments.get(name, Moments()) + moments

    def usual(self, name: str, now: Moments) -> tuple[float, float]:
        """Mean and deviation over the steps before this one; `now`'s own during the warm-up. Notes `now`."""
        self.note(name, now)
        self.averaged.add(name)
        average = self.averages.get(name)
        if average is None or average.batches < max(self.warmup, 1):
            return now.mean, now.std
        return average.mean, average.std

    def close_step(self) -> None:
        """Let the averages take in the step under way."""
        fresh = MovingAverage(self.decay)
        taken = {
            name: self.averages.get(name, fresh).updated(moments)
            for name, moments in self.moments.items()
            if name in self.averaged
        }
        self.averages = {**self.averages, **taken}
        self.moments, self.averaged = {}, set()


def is_exponential(settings: WeightingSettings) -> bool:
    """Whether weights are `clip(exp(A / β), min, max)`."""
    return settings.family == "grpo" or (settings.family == "critic" and settings.critic.form == "exp")


def before_the_policy(
    settings: WeightingSettings, batches: Sequence[Batch], labelled: Sequence[torch.Tensor], memory: Memory
) -> list[torch.Tensor]:
    """Raw weights of every micro-batch of a step, or of one: float32 [batch, time, heads] each."""
    if settings.family == "uniform":
        return [uniform.weights(mask) for mask in labelled]
    if settings.family == "grpo":
        clip = settings.grpo.clip
        advantages, beta = [batch.columns[ADVANTAGE].clamp(-clip, clip) for batch in batches], settings.grpo.beta
    else:
        advantages, beta = _advantages(settings, batches, memory), settings.critic.beta
    both = list(zip(advantages, labelled, strict=True))
    if is_exponential(settings):
        return [critic.weights(tokens, mask, beta, settings.min, settings.max) for tokens, mask in both]
    return [critic.head_softmax(tokens, mask, beta) for tokens, mask in both]


def _advantages(settings: WeightingSettings, batches: Sequence[Batch], memory: Memory) -> list[torch.Tensor]:
    """The critic's, [batch, time] each, whitened over the whole step's labelled tokens or by the moving average."""
    form, found, now = settings.critic, [], Moments()
    for batch in batches:
        solution = batch.labels != IGNORE
        errors = critic.td_errors(batch.columns[VALUE], batch.columns[REWARD], batch.segment_ids, form.gamma)
        found.append(critic.gae(errors, batch.segment_ids, form.gamma, form.lam))
        memory.note("td_error", Moments.of(errors, solution))
        now += Moments.of(found[-1], solution)
    if form.whiten == "none":
        memory.note("advantage", now)
        return found
    if form.whiten == "ema":
        mean, std = memory.usual("advantage", now)
    else:
        memory.note("advantage", now)
        mean, std = now.mean, now.std
    return [whiten(tokens, mean, std) for tokens in found]


def after_the_policy(settings: WeightingSettings, head: Head, memory: Memory) -> torch.Tensor:
    """Raw weights of one head of one micro-batch: float32 [batch, time, 1]."""
    labelled = (head.targets != IGNORE)[..., None]
    if settings.family == "gradient":
        return _by_gradient(settings, head, labelled, memory)
    losses = head.losses[..., None]
    reference = _sees(head, REFERENCE_LOSS)
    if settings.family == "grpo":
        clip, advantages = settings.grpo.clip, _sees(head, ADVANTAGE)
        if head.number == 1:  # a further head sees less than the reference: what it lacks is no drift
            penalty = grpo.kl_penalty(losses, reference)
            memory.note("kl", Moments.of(penalty, labelled))
            advantages = advantages - settings.grpo.kl * penalty
        advantages = advantages.clamp(-clip, clip)
        return critic.exponential(advantages, labelled, settings.grpo.beta, settings.min, settings.max)
    excess = rho1_weighted.excess_loss(losses, reference)
    memory.note("excess_loss", Moments.of(excess, labelled))
    form = settings.rho1
    if settings.family == "rho1_tokenskip":
        return rho1_tokenskip.weights(excess, labelled, form.share)
    return rho1_weighted.weights(excess, labelled, sequences(head.batch.segment_ids), form.temperature, form.minimum)


def _by_gradient(settings: WeightingSettings, head: Head, labelled: torch.Tensor, memory: Memory) -> torch.Tensor:
    tokens = head.look()
    norms = tokens.logit_gradient_norm if settings.gradient.of == "logits" else tokens.hidden_gradient_norm
    importance = norms[..., None]
    # heads differ in how sure they are: each has a usual importance of its own
    mean, std = memory.usual(f"importance_head_{head.number}", Moments.of(importance, labelled))
    return gradient.weights(importance, labelled, mean, std, settings.gradient.outlier)


def _sees(head: Head, column: str) -> torch.Tensor:
    """A quantity of tokens as one of this head's positions: [batch, time, 1]."""
    return ahead(head.batch.columns[column], head.number)[..., -1:]
