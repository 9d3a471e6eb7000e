"""What is known of the training tokens before the policy runs: the columns that the weighting family reads."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from wmtp_worker.data.dataset import Dataset, rewards
from wmtp_worker.data.packing import Column
from wmtp_worker.data.pairs import make_pairs
from wmtp_worker.data.tokenizer import Sample
from wmtp_worker.errors import InputError
from wmtp_worker.model.compat import Named
from wmtp_worker.settings import Settings
from wmtp_worker.training.families import ADVANTAGE, CORRECT, PROBLEM, REWARD, VALUE
from wmtp_worker.training.frozen import frozen_models
from wmtp_worker.training.quality import quality
from wmtp_worker.training.scores import Scorer
from wmtp_worker.weighting.grpo import group_advantages

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Policy:
    """The tokenizer that the samples were made with, and its digest."""

    tokens: Named
    digest: str


def add_columns(settings: Settings, data: Dataset, policy: Policy, scorer: Scorer) -> tuple[Dataset, dict[str, str]]:
    """The data with the columns of `weighting.family`; and the digests of the frozen models that said them, by setting.

    Everything is looked at before anything is computed. Raises `InputError` where a frozen model is not there or does
    not fit the policy, and where rewards tell no solution from another; and what `scorer.score` raises.
    """
    weighting, samples = settings.weighting, data.samples
    known: dict[str, Column] = {}
    if weighting.family == "grpo":
        known[ADVANTAGE] = advantages(samples)
    models = frozen_models(settings)
    for model in models:
        model.check(policy.tokens, max(len(sample.ids) for sample in samples), policy.digest)
    digests = {model.key: model.digest(scorer.poll) for model in models}
    for model in models:
        known[model.column] = scorer.score(model, (digests[model.key], policy.digest), samples)
    if weighting.learns_values:
        known[CORRECT] = rewards(samples)
        # exact up to 2^24
        known[PROBLEM] = [np.full(len(sample.ids), sample.problem, np.float32) for sample in samples]
    if weighting.family == "critic":
        if weighting.critic.rewards == "verifiable":
            known[REWARD] = rewards(samples)
        elif weighting.needs_reward_model or not weighting.learns_values:  # else the last value, when it is known
            known[REWARD] = _last_only(known[REWARD if weighting.needs_reward_model else VALUE])
        if weighting.needs_reward_model:
            _log_quality(settings, samples, known[REWARD])
    elif weighting.family != "grpo" and any(sample.reward == 0 for sample in samples):
        log.warning(
            "incorrect solutions are learned like correct ones: weighting.family=%s knows none", weighting.family
        )
    by_solution = weighting.family == "grpo" and not weighting.grpo.kl and weighting.control == "shuffled"
    if weighting.control != "none" and (weighting.family == "uniform" or by_solution):
        log.warning(
            "weighting.control=%s changes nothing: weighting.family=%s weighs all tokens of a solution alike",
            weighting.control,
            weighting.family,
        )
    return data.with_columns(**known), digests


def advantages(samples: Sequence[Sample]) -> Column:
    """The column "advantage": each solution's, relative to the others of its problem, for all of its tokens.

    Raises `InputError` where no problem has solutions that differ in their reward. Warns of problems that have not.
    """
    problems = torch.tensor([sample.problem for sample in samples])
    found = group_advantages(torch.tensor([sample.reward for sample in samples]), problems)
    sizes = Counter(problems.tolist())
    telling = set(problems[found != 0].tolist())
    alone = sum(size == 1 for size in sizes.values())
    if not telling:
        what = "one solution" if alone == len(sizes) else "only solutions that are equally right or wrong"
        raise InputError(
            f"every training problem has {what}: weighting.family=grpo has nothing to compare",
            where=f"{len(sizes)} problems",
            fix="use data with correct and incorrect solutions: wmtp data label SRC DST --mutations 4",
        )
    if same := len(sizes) - len(telling):
        log.warning(
            "%d of %d problems teach like uniform ones: %d with one solution, %d with equal rewards",
            same,
            len(sizes),
            alone,
            same - alone,
        )
    return [np.full(len(sample.ids), value, np.float32) for sample, value in zip(samples, found.tolist(), strict=True)]


def _log_quality(settings: Settings, samples: list[Sample], scores: Column) -> None:
    """Say how well a reward model tells correct from incorrect solutions, where both are there and in pairs."""
    choice = settings.data.pairs
    labelled = [number for number, sample in enumerate(samples) if sample.reward in (0.0, 1.0)]
    ends = torch.tensor([float(scores[number][-1]) for number in labelled])
    correct = torch.tensor([samples[number].reward for number in labelled])
    try:
        pairs = make_pairs(
            [samples[number] for number in labelled],
            per_problem=choice.per_problem,
            length_share=choice.length_share,
            seed=settings.run.seed,
        )
    except InputError:
        return  # nothing to compare
    # reward models are trained like `value.objective=pairwise`
    found = quality(ends, ends.sigmoid(), correct, pairs)
    log.info("the reward model, of %d solutions and %d pairs: %s", len(ends), len(pairs), found)


def _last_only(column: Column) -> Column:
    """The same with 0 before the last token of each sample."""
    kept = [np.zeros_like(values) for values in column]
    for values, before in zip(kept, column, strict=True):
        values[-1] = before[-1]
    return kept
