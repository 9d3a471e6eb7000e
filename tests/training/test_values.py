"""The value model's objectives, batches and numbers, by hand and against slow versions of the formulas."""

import math

import numpy as np
import pytest
import torch

from wmtp_worker.data.dataset import Dataset, rewards
from wmtp_worker.data.packing import collate
from wmtp_worker.data.pairs import Pair, PairRows, make_pairs
from wmtp_worker.data.sampler import PackedSampler
from wmtp_worker.data.tokenizer import Sample
from wmtp_worker.errors import InputError
from wmtp_worker.model.value import value_from
from wmtp_worker.settings import load
from wmtp_worker.training.families import REWARD
from wmtp_worker.training.group import Group
from wmtp_worker.training.objective import bradley_terry, states
from wmtp_worker.training.quality import calibration_error, explained_variance, quality, reliability
from wmtp_worker.training.values import Exam, ValueTask
from wmtp_worker.weighting.spans import last_tokens
from wmtp_worker.weighting.statistics import Moments

CPU = torch.device("cpu")
LENGTH = 40


def samples(problems=4):
    """Each problem has one correct and two incorrect solutions, of lengths that differ a little."""
    random = np.random.default_rng(1)
    made = []
    for problem in range(problems):
        for reward in (1.0, 0.0, 0.0):
            length = int(random.integers(11, 14))
            made.append(Sample(random.integers(3, 99, length).astype(np.int32), 4, problem, reward))
    return made


@pytest.fixture
def data():
    made = samples()
    sampler = PackedSampler([len(sample.ids) for sample in made], LENGTH, seed=1)
    return Dataset(made, sampler, LENGTH, 0).with_columns(**{REWARD: rewards(made)})


@pytest.fixture
def pairs(data):
    return make_pairs(data.samples, per_problem=8, length_share=0.5, seed=1)


def settings(*overrides):
    return load(overrides=overrides, environ={})


@pytest.fixture
def model(tiny_model_folder, one_thread):
    value = value_from(tiny_model_folder, 1, width=8, seed=3)
    torch.nn.init.normal_(value.head.output.weight, generator=torch.Generator().manual_seed(1))
    return value


def test_bradley_terry_by_hand():
    # σ(0) = 1/2; σ(2) by the formula; no overflow where the order is wrong by far
    found = bradley_terry(torch.tensor([1.0, 3.0, -500.0]), torch.tensor([1.0, 1.0, 500.0]))
    assert found.tolist() == pytest.approx([math.log(2), -math.log(1 / (1 + math.exp(-2))), 1000.0])


def test_states_and_last_tokens_by_hand():
    one, two = (Sample(np.arange(length, dtype=np.int32), prompt, 0, 1.0) for length, prompt in ((4, 2), (3, 1)))
    batch = collate([[one, two], [two]], 9, pad_id=0)
    # a prompt's last token is a state, too: from there the first token of the solution is judged
    assert states(batch).int().tolist() == [[0, 1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0, 0]]
    assert last_tokens(batch.segment_ids).int().tolist() == [[0, 0, 0, 1, 0, 0, 1, 0, 0], [0, 0, 1, 0, 0, 0, 0, 0, 0]]
    # also where a row is full
    assert last_tokens(torch.tensor([[1, 1, 2, 2]])).int().tolist() == [[0, 1, 0, 1]]


def test_quality_by_hand():
    chance = torch.tensor([0.95, 0.85, 0.15, 0.15])
    correct = torch.tensor([1.0, 0.0, 0.0, 0.0])
    found = quality(chance, chance, correct, [Pair(0, 1), Pair(2, 3), Pair(3, 0)])
    assert found.pairwise_accuracy == pytest.approx(0.5)  # one right, one equal, one wrong
    errors = [0.05, -0.85, -0.15, -0.15]
    assert found.explained_variance == pytest.approx(1 - np.var(errors) / np.var([1, 0, 0, 0]))
    # the two of the second bin are counted together
    assert found.calibration == pytest.approx((0.05 + 0.85 + 0.3) / 4)


def test_a_calibrated_judge_has_no_error_and_a_perfect_one_explains_all():
    chance = torch.full((10,), 0.7)
    assert calibration_error(chance, torch.tensor([1.0] * 7 + [0.0] * 3)) == pytest.approx(0, abs=1e-6)
    assert calibration_error(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0])) == 0
    bins = reliability(torch.tensor([0.25, 0.5, 0.5, 1.0]), torch.tensor([0.0, 1.0, 0.0, 1.0]))
    assert bins == [[0.25, 0.0, 1], [0.5, 0.5, 2], [1.0, 1.0, 1]]
    assert explained_variance(Moments(4, 0, 0), Moments(4, 2, 2)) == 1
    assert explained_variance(Moments(4, 0, 1), Moments(4, 4, 4)) == 0  # nothing to explain


def test_rows_of_pairs(data, pairs):
    rows = PairRows(data, pairs, seed=1, packing=True)
    seen = []
    for taken in rows.sampler.rows(0):
        batch = rows.batch([taken])
        ends = last_tokens(batch.segment_ids)
        for side, row in zip(("correct", "incorrect"), range(2), strict=True):
            expected = [data.samples[getattr(pairs[place], side)] for place in taken]
            assert batch.input_ids[row][ends[row]].tolist() == [sample.ids[-1] for sample in expected]
        seen += taken
    assert sorted(seen) == list(range(len(pairs)))
    assert len(rows.sampler.rows(0)) < len(pairs)
    assert PairRows(data, pairs, seed=1, packing=False).batch([[0], [1]]).input_ids.shape == (4, LENGTH)


def slow_loss(model, task_data, pairs, objective, gamma, lam):
    """The objective of all pairs or samples at once, one sequence after the other."""
    values = []
    for sample in task_data.samples:
        ids = torch.from_numpy(sample.ids).long()[None]
        mask = torch.ones(len(sample.ids), len(sample.ids), dtype=torch.bool).tril()[None, None]
        values.append(model(ids, torch.arange(len(sample.ids))[None], mask)[0])
    if objective == "pairwise":
        losses = [-(values[pair.correct][-1] - values[pair.incorrect][-1]).sigmoid().log() for pair in pairs]
        return torch.stack(losses).mean()
    errors = []
    for sample, value in zip(task_data.samples, values, strict=True):
        known, last = value.tolist(), len(value) - 1
        target = [0.0] * last + [sample.reward]
        for t in range(last - 1, -1, -1):
            final = t + 1 == last
            target[t] = sample.reward if final else gamma * ((1 - lam) * known[t + 1] + lam * target[t + 1])
        errors += [(value[t] - target[t]) ** 2 for t in range(sample.prompt_length - 1, last + 1)]
    return torch.stack(errors).mean()


@pytest.mark.parametrize("size", [2, 100])
@pytest.mark.parametrize("objective", ["pairwise", "lambda_return"])
def test_loss_and_gradient_against_the_slow_reference(objective, size, data, pairs, model):
    chosen = settings(
        f"value.objective={objective}", "weighting.critic.gamma=0.9", "weighting.critic.lam=0.7", "run.stage=value"
    )
    rows = PairRows(data, pairs, seed=1, packing=True) if objective == "pairwise" else data
    task = ValueTask(chosen, model, Group(CPU), rows, Exam(chosen, data, pairs))
    epoch = rows.sampler.rows(0)
    batches = [rows.batch(epoch[start : start + size]) for start in range(0, len(epoch), size)]
    for backward in task.begin(0, batches):
        backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    expected = slow_loss(model, data, pairs, objective, 0.9, 0.7)
    expected.backward()
    assert task.loss() == pytest.approx(float(expected.detach()), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("objective", ["pairwise", "lambda_return"])
def test_validation_against_the_slow_reference(objective, data, pairs, model):
    chosen = settings(f"value.objective={objective}", "training.micro_batch_size=2")
    report = ValueTask(chosen, model, Group(CPU), data, Exam(chosen, data, pairs)).validate(lambda: None)
    assert model.training
    with torch.no_grad():
        loss = float(slow_loss(model.eval(), data, pairs, objective, 1.0, 0.95))
        batch = data.batch([[place] for place in range(len(data.samples))])
        mask = torch.stack([(one[:, None] == one).tril() for one in batch.segment_ids])[:, None]
        values = model(batch.input_ids, batch.position_ids, mask)
    assert report.value_loss == pytest.approx(loss, rel=1e-5)
    assert (report.pairs, report.samples) == (len(pairs), len(data.samples))
    ends = values[last_tokens(batch.segment_ids)]
    right = sum(float(ends[pair.correct] > ends[pair.incorrect]) for pair in pairs)
    assert report.pairwise_accuracy == pytest.approx(right / len(pairs))
    reward = torch.tensor([sample.reward for sample in data.samples])[:, None].expand(values.shape)[states(batch)]
    said = (values.sigmoid() if objective == "pairwise" else values)[states(batch)]
    expected = 1 - float((reward - said).var(correction=0) / reward.var(correction=0))
    assert report.token_explained_variance == pytest.approx(expected, rel=1e-4)


def test_a_limit_of_the_validation_keeps_pairs_whole(data, pairs):
    chosen = settings("training.micro_batch_size=1", "evaluation.max_batches=2")
    exam = Exam(chosen, data, pairs)
    assert len(list(exam)) == 2
    assert all(exam.correct[pair.correct] == 1 and exam.correct[pair.incorrect] == 0 for pair in exam.pairs)
    assert len(Exam(settings(), data, pairs).correct) == len(data.samples)
    with pytest.raises(InputError, match=r"max_batches=1 batches of 1 rows hold no pair.*0 for the whole"):
        Exam(settings("training.micro_batch_size=1", "evaluation.max_batches=1", "data.packing=false"), data, pairs)
