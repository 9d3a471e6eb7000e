"""Values learned beside the policy: the gradient against one graph of slow formulas, pairs, weights, refusals."""

import dataclasses
import itertools
import logging
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.training.test_loss import ROW, make_model, sample
from tests.weighting import reference
from wmtp_worker.data.dataset import Dataset
from wmtp_worker.data.packing import collate
from wmtp_worker.data.sampler import PackedSampler
from wmtp_worker.errors import InputError
from wmtp_worker.model.lora import add_lora
from wmtp_worker.model.mtp import TrunkOutput, packed_attention_mask
from wmtp_worker.settings import load
from wmtp_worker.settings.stages import policy_run
from wmtp_worker.training.auxiliary import AuxiliaryValues, check_data, pairs_among
from wmtp_worker.training.columns import add_columns
from wmtp_worker.training.group import Group
from wmtp_worker.training.policy import PolicyTask

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
HEADS, COEFFICIENT, GAMMA, LAM, BETA, LOW, HIGH = 3, 0.7, 0.9, 0.8, 2.0, 0.2, 3.0
SHARE = 0.4


def settings(*overrides):
    chosen = (
        *("weighting.family=critic", "value.trunk_head=true", "data.solutions=all", "run.stage=policy"),
        *(f"weighting.critic.auxiliary={COEFFICIENT}", f"data.sequence_length={ROW}", f"model.heads={HEADS}"),
        *(f"weighting.critic.gamma={GAMMA}", f"weighting.critic.lam={LAM}", f"weighting.critic.beta={BETA}"),
        *(f"weighting.min={LOW}", f"weighting.max={HIGH}", f"data.pairs.length_share={SHARE}"),
        *("training.micro_batch_size=2", "training.accumulation=2", "value.hidden=8"),
    )
    return load(overrides=[*chosen, *overrides], environ={})


def labelled(length, prompt_length, start, problem, reward):
    return dataclasses.replace(sample(length, prompt_length, start), problem=problem, reward=float(reward))


# two micro-batches of two rows; a pair in the first, two in the second, some too different in length
SAMPLES = [
    [
        [labelled(9, 3, 1, 0, 1), labelled(7, 3, 2, 0, 0)],
        [labelled(10, 2, 3, 1, 1), labelled(5, 2, 4, 1, 0)],
    ],
    [
        [labelled(6, 2, 5, 2, 0), labelled(5, 2, 6, 2, 1), labelled(5, 1, 7, 0, 1)],
        [labelled(6, 2, 8, 2, 1), labelled(8, 3, 9, 3, 0)],
    ],
]


def make_policy(lora=False, **how):
    model = make_model(HEADS, tied=True, **how)
    if lora:
        add_lora(model, rank=2, alpha=4.0)
    head = model.add_value_head(8, seed=3)
    with torch.no_grad():
        head.norm.weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(2))
        head.head.output.weight.normal_(generator=torch.Generator().manual_seed(1))
    return model


def make_task(chosen, model):
    """As `stages.policy_task` does it; what validates and records is not looked at."""
    flat = [one for rows in SAMPLES for row in rows for one in row]
    data = Dataset(flat, PackedSampler([len(one.ids) for one in flat], ROW, seed=1), ROW, 0)
    data, digests = add_columns(chosen, data, None, None)
    assert digests == {}
    return PolicyTask(chosen, model, Group(CPU), data, data, None, AuxiliaryValues(chosen, model, Group(CPU)))


def batches_of(task):
    """`SAMPLES` as batches."""
    places = itertools.count()
    return [task.data.batch([[next(places) for _ in row] for row in rows]) for rows in SAMPLES]


def slow_gradient(model, chosen):
    """Every sample alone, all in one graph. Returns the policy's loss, the values' and the weights by micro-batch."""
    pairwise = chosen.value.objective == "pairwise"
    losses, values_losses, weights = [[] for _ in range(HEADS)], [], []
    for rows in SAMPLES:
        alone = [(one, *run_alone(model, one)) for row in rows for one in row]
        advantages = []
        for one, values, _ in alone:
            known, last = values.tolist(), len(one.ids) - 1
            outcome = one.reward if chosen.weighting.critic.rewards == "verifiable" else known[last]
            errors = reference.td_errors(known, [0.0] * last + [outcome], GAMMA)
            advantages.append(reference.gae(errors, GAMMA, LAM))
        told = [a for (one, *_), found in zip(alone, advantages, strict=True) for a in found[one.prompt_length :]]
        mean = sum(told) / len(told)
        std = math.sqrt(sum((a - mean) ** 2 for a in told) / len(told))
        here = []
        for (one, _, tokens), found in zip(alone, advantages, strict=True):
            for k, t in itertools.product(range(1, HEADS + 1), range(len(one.ids))):
                if one.prompt_length <= t + k < len(one.ids):
                    weight = reference.exp_clipped((found[t + k] - mean) / std, BETA, LOW, HIGH)
                    here.append((k, weight, tokens[k - 1][t]))
        scale = sum(weight for _, weight, _ in here) / len(here)
        for k, weight, loss in here:
            losses[k - 1].append(weight / scale * loss)
        weights.append(sorted(weight / scale for _, weight, _ in here))
        values_losses += slow_ranking(alone) if pairwise else slow_regression(alone)
    policy = sum(sum(of_head) / len(of_head) for of_head in losses) / HEADS
    value = sum(values_losses) / len(values_losses)
    (policy + COEFFICIENT * value).backward()
    return float(policy.detach()), float(value.detach()), weights


def run_alone(model, one):
    """Values of its tokens, and each head's cross-entropies by position."""
    ids = torch.from_numpy(one.ids).long()
    mask = torch.ones(1, 1, len(ids), len(ids), dtype=torch.bool).tril()
    trunk = model.trunk(ids[None], torch.arange(len(ids))[None], mask)
    tokens = [F.cross_entropy(model.head_logits(k, trunk)[0, :-k], ids[k:], reduction="none") for k in (1, 2, 3)]
    return model.value_head(trunk.hidden)[0], tokens


def slow_ranking(alone):
    def length(one):
        return len(one.ids) - one.prompt_length

    for (one, better, _), (other, worse, _) in itertools.product(alone, alone):
        both = length(one), length(other)
        even = abs(both[0] - both[1]) <= SHARE * max(both)
        if one.problem == other.problem and one.reward == 1 and other.reward == 0 and even:
            yield -(better[-1] - worse[-1]).sigmoid().log()


def slow_regression(alone):
    for one, values, _ in alone:
        last = len(one.ids) - 1
        targets = reference.lambda_returns(values.tolist(), [0.0] * last + [one.reward], GAMMA, LAM)
        for t in range(one.prompt_length - 1, last + 1):
            yield (values[t] - targets[t]) ** 2


@pytest.mark.parametrize(
    ("objective", "rewards", "lora"),
    [("pairwise", "value", False), ("lambda_return", "verifiable", False), ("lambda_return", "value", True)],
)
def test_the_gradient_is_that_of_both_losses_in_one_graph(objective, rewards, lora):
    chosen = settings(f"value.objective={objective}", f"weighting.critic.rewards={rewards}")
    model, other = make_policy(lora), make_policy(lora)
    task = make_task(chosen, model)
    calls = []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    for backward in task.begin(0, batches_of(task)):
        backward()
    assert len(calls) == len(SAMPLES)  # the trunk runs once
    policy, value, weights = slow_gradient(other, chosen)
    assert task.loss() == pytest.approx(policy, rel=1e-4)
    facts = task.end(counted=False).metrics
    assert facts["value_loss"] == pytest.approx(value, rel=1e-4)
    assert facts["weight_min"] == pytest.approx(min(map(min, weights)), rel=1e-3)
    assert facts["weight_max"] == pytest.approx(max(map(max, weights)), rel=1e-3)
    assert facts["weight_std"] > 0.1
    # a bias that all values share moves no pair: its gradient is rounding alone
    rounding = 1e-7 * max(float(one.grad.abs().max()) for one in other.parameters() if one.requires_grad)
    for (name, parameter), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (parameter.grad is None) == (expected.grad is None) == (not parameter.requires_grad), name
        if parameter.requires_grad:
            nearly = 2e-5 * float(expected.grad.abs().max()) + rounding
            torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-3, atol=nearly, msg=name)


def test_what_is_told_of_a_step():
    chosen = settings("value.objective=pairwise")
    model = make_policy()
    task = make_task(chosen, model)
    for backward in task.begin(0, batches_of(task)):
        backward()
    facts = task.end(counted=False).metrics
    said = [(one, values.detach()) for rows in SAMPLES for row in rows for one in row
            for values, _ in [run_alone(model, one)]]  # fmt: skip
    ends = np.array([float(values[-1].sigmoid()) for _, values in said])
    correct = np.array([one.reward for one, _ in said])
    assert facts["explained_variance"] == pytest.approx(1 - np.var(correct - ends) / np.var(correct), abs=1e-4)
    by_state = [
        (one.reward, float(value)) for one, values in said for value in values[one.prompt_length - 1 :].sigmoid()
    ]
    rewards, chances = np.array(by_state).T
    assert facts["token_explained_variance"] == pytest.approx(1 - np.var(rewards - chances) / np.var(rewards), abs=1e-4)
    assert facts["value_pairs"] == 3
    assert facts["pairwise_accuracy"] in (0, 1 / 3, 2 / 3, 1)
    assert {"td_error_mean", "td_error_std", "advantage_ema_mean"} <= facts.keys()


def test_where_no_pair_lies_in_a_step_every_parameter_has_a_gradient_of_zeros():
    chosen = settings("value.objective=pairwise", "data.pairs.length_share=0")
    task = make_task(chosen, make_policy())
    (backward, _) = task.begin(0, batches_of(task))
    backward()
    assert all((parameter.grad == 0).all() for parameter in task.model.value_head.parameters())
    facts = task.end(counted=False).metrics
    assert facts["value_pairs"] == 0
    assert not {"value_loss", "pairwise_accuracy"} & facts.keys()
    assert all(map(math.isfinite, facts["head_loss"]))


def test_weights_begin_uniform_and_follow_the_head_as_it_learns():
    chosen = settings("value.objective=lambda_return", "weighting.warmup=0", "weighting.critic.whiten=batch")
    model = make_policy()
    with torch.no_grad():
        model.value_head.head.output.weight.zero_()
    task = make_task(chosen, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    told = []
    for step in range(4):
        optimizer.zero_grad()
        for backward in task.begin(step, batches_of(task)):
            backward()
        told.append(task.end(counted=False).metrics)
        optimizer.step()
    assert told[0]["weight_std"] == 0  # values that are all 0 prefer nothing
    assert all(facts["weight_std"] > 0.01 for facts in told[1:])
    assert told[-1]["value_loss"] < 0.9 * told[0]["value_loss"]


def test_a_value_that_is_not_finite_is_left_to_the_loop():
    task = make_task(settings("value.objective=lambda_return"), make_policy())
    with torch.no_grad():
        task.model.value_head.head.output.bias.fill_(math.nan)
    for backward in task.begin(0, batches_of(task)):
        backward()
    assert math.isfinite(task.loss())
    assert not math.isfinite(sum(float(parameter.grad.sum()) for parameter in task.model.parameters()))


@pytest.mark.parametrize("seed", range(3))
def test_pairs_against_a_loop(seed):
    random = np.random.default_rng(seed)
    problems, correct, lengths = (random.integers(0, most, 12) for most in (3, 2, 9))
    expected = {
        (i, j)
        for i, j in itertools.product(range(12), range(12))
        if problems[i] == problems[j] and correct[i] and not correct[j]
        and abs(lengths[i] - lengths[j]) <= 0.5 * max(lengths[i], lengths[j])
    }  # fmt: skip
    first, second = pairs_among(*(torch.tensor(one) for one in (problems, correct, lengths)), 0.5)
    assert expected
    assert set(zip(first.tolist(), second.tolist(), strict=True)) == expected
    assert len(first) == len(expected)


def data_of(samples, size=2):
    return Dataset(samples, PackedSampler([len(one.ids) for one in samples], ROW, seed=1), ROW, 0)


def test_data_that_teach_no_values(caplog):
    right = [labelled(5, 2, n, n, 1) for n in range(4)]
    for reward, kind in ((1, "correct"), (0, "incorrect")):
        some = [dataclasses.replace(one, reward=float(reward)) for one in right]
        with pytest.raises(InputError, match=f"every solution is {kind}: values.*4 training samples.*data label"):
            check_data(settings(), data_of(some))
    other = [*right, labelled(5, 2, 9, 77, 0)]
    with pytest.raises(InputError, match=r"no micro-batch has a correct and.*one problem.*objective=lambda_return"):
        check_data(settings(), data_of(other))
    check_data(settings("value.objective=lambda_return"), data_of(other))
    with caplog.at_level(logging.INFO, "wmtp_worker"):
        few = [labelled(16, 2, n, n // 8, n % 2) for n in range(40)]
        check_data(settings("training.accumulation=1"), data_of(few))
        assert "pairs a step to learn values from; set value.objective=lambda_return" in caplog.text
        caplog.clear()
        check_data(settings(), data_of([labelled(5, 2, n, 0, n % 2) for n in range(9)]))
    assert "pairs a step to learn values from" in caplog.text
    assert "lambda_return" not in caplog.text


def test_whoever_looks_changes_nothing():
    model = make_policy()
    values = AuxiliaryValues(settings("weighting.critic.rewards=value"), model, Group(CPU))
    batch = collate(SAMPLES[0], ROW, pad_id=0)
    trunk = model.trunk(batch.input_ids, batch.position_ids, packed_attention_mask(batch.segment_ids))
    leaf = TrunkOutput(trunk.hidden.detach().requires_grad_(), trunk.position_embeddings, trunk.attention_mask)
    told = values.judge(leaf, batch)
    assert leaf.hidden.grad is None
    assert all(parameter.grad is None for parameter in model.parameters())
    assert told.columns["value"].equal(model.value_head(trunk.hidden).detach())
    assert batch.columns == {}
    ends = told.columns["reward"] != 0
    assert ends.sum() == 4
    assert told.columns["reward"][ends].equal(told.columns["value"][ends])


def test_the_first_stage_s_head_is_taken_where_there_is_one():
    chosen = settings("run.stage=all", "run.name=mine")
    assert chosen.trains_values
    assert policy_run(chosen).weighting.critic.value == "mine-value"
    assert not settings().trains_values
