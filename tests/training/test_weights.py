"""A step's weights: normalised, controlled, reproducible, and told of."""

import dataclasses

import pytest
import torch

from wmtp_worker.data.packing import IGNORE, Batch
from wmtp_worker.errors import InputError
from wmtp_worker.settings import load
from wmtp_worker.training.linear_cross_entropy import LinearCrossEntropy
from wmtp_worker.training.loss import Head, mtp_labels
from wmtp_worker.training.weights import Weighter

ROWS, TIME, HEADS = 4, 12, 2
UPFRONT = ("uniform", "critic", "grpo")
BY_HEAD = ("rho1_weighted", "rho1_tokenskip", "gradient")


def weighter(family, *overrides, seed=1):
    chosen = (f"weighting.family={family}", "weighting.reference=/m", "weighting.critic.value=/v", "data.solutions=all")
    settings = load(overrides=[*chosen, *(f"weighting.{text}" for text in overrides)], environ={})
    return Weighter(settings.weighting, seed)


def make_batch(rows=ROWS):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 9, (rows, TIME), generator=generator)
    segments = torch.tensor([[1] * 5 + [2] * 6 + [0]] * rows)
    labels = ids.masked_fill(segments == 0, IGNORE)
    labels[:, [0, 5]] = IGNORE
    columns = {
        name: torch.randn(rows, TIME, generator=generator)
        for name in ("reference_loss", "value", "reward", "advantage")
    }
    return Batch(ids, labels, torch.zeros_like(ids), segments, columns)


def part(batch, rows):
    columns = {name: column[rows] for name, column in batch.columns.items()}
    return Batch(batch.input_ids[rows], batch.labels[rows], batch.position_ids[rows], batch.segment_ids[rows], columns)


def targets_of(batch):
    return mtp_labels(batch.labels, batch.segment_ids, HEADS)


def heads_of(batch):
    """What a policy might make of it, the same for the same row."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(HEADS, TIME, 9, generator=generator)[:, None] * batch.input_ids[..., None]
    for number in range(1, HEADS + 1):
        targets = targets_of(batch)[..., number - 1]
        yield Head(number, batch, targets, LinearCrossEntropy(logits[number - 1], torch.eye(9), targets).tokens)


def weigh(made, batches, step=0):
    """The weights of each micro-batch, [rows, time, heads], and what is told of them."""
    weighs = made.begin(step, batches, [targets_of(batch) for batch in batches])
    weights = [
        torch.stack([one(head) for head in heads_of(batch)], -1) for one, batch in zip(weighs, batches, strict=True)
    ]
    return weights, made.end()


def test_uniform_weights_are_ones_to_the_last_bit():
    # whatever the normalisation and the control: plain multi-token prediction stays what it was
    batch = make_batch()
    for how in ("mean1", "mean1_clip", "none"):
        for control in ("none", "shuffled", "random_matched"):
            ((found,), _) = weigh(weighter("uniform", f"normalise={how}", f"control={control}"), [batch])
            assert found.equal((targets_of(batch) != IGNORE).float())


@pytest.mark.parametrize("family", UPFRONT)
def test_micro_batches_are_weighed_like_one_large_batch(family):
    batch = make_batch()
    ((whole,), facts) = weigh(weighter(family), [batch])
    parts, again = weigh(weighter(family), [part(batch, slice(0, 1)), part(batch, slice(1, None))])
    torch.testing.assert_close(torch.cat(parts), whole)
    assert again == pytest.approx(facts)


@pytest.mark.parametrize("family", [*UPFRONT, *BY_HEAD])
@pytest.mark.parametrize("control", ["none", "shuffled", "random_matched"])
def test_the_mean_is_one_whatever_the_family(family, control):
    batches = [make_batch(2), make_batch(3)]
    weights, facts = weigh(weighter(family, f"control={control}"), batches)
    labelled = torch.cat([targets_of(batch) != IGNORE for batch in batches])
    chosen = torch.cat(weights)[labelled]
    assert float(chosen.mean()) == pytest.approx(1, abs=1e-5)
    assert (torch.cat(weights)[~labelled] == 0).all()
    assert facts["weight_mean"] == pytest.approx(1, abs=1e-5)
    assert facts["weight_std"] == pytest.approx(float(chosen.std(correction=0)), abs=1e-5)
    assert 0 < facts["weight_entropy"] <= 1
    assert (facts["weight_std"] > 0.1) == (family != "uniform")


@pytest.mark.parametrize("family", BY_HEAD)
def test_families_that_look_at_losses_are_normalised_head_by_head(family):
    batches = [make_batch(2), make_batch(3)]
    weights, _ = weigh(weighter(family, "normalise=mean1_clip", "min=0", "max=2"), batches)
    for found, batch in zip(weights, batches, strict=True):
        for k in range(HEADS):
            chosen = found[..., k][targets_of(batch)[..., k] != IGNORE]
            assert float(chosen.mean()) == pytest.approx(1, abs=1e-5)
            assert chosen.max() <= 2


@pytest.mark.parametrize("family", ["critic", "gradient"])
def test_controls_keep_weights_and_lose_places(family):
    batch = make_batch()
    labelled = targets_of(batch) != IGNORE
    ((base,), _) = weigh(weighter(family), [batch])
    ((shuffled,), _) = weigh(weighter(family, "control=shuffled"), [batch])
    assert not shuffled.allclose(base)
    for row in range(ROWS):
        for segment in (1, 2):
            for k in range(HEADS):
                mask = labelled[row, :, k] & (batch.segment_ids[row] == segment)
                torch.testing.assert_close(shuffled[row, :, k][mask].sort().values, base[row, :, k][mask].sort().values)
    ((drawn,), _) = weigh(weighter(family, "control=random_matched", "normalise=none"), [batch])
    ((source,), _) = weigh(weighter(family, "normalise=none"), [batch])
    assert not drawn.allclose(source)
    assert set(drawn[labelled].tolist()) <= set(source[labelled].tolist())


@pytest.mark.parametrize("control", ["shuffled", "random_matched"])
def test_chance_follows_from_seed_and_step_alone(control):
    batch = make_batch()
    override = f"control={control}"
    made = weighter("grpo", override)
    ((first,), _), ((second,), _) = weigh(made, [batch], 0), weigh(made, [batch], 1)
    assert not first.equal(second)
    torch.manual_seed(77)
    before = torch.random.get_rng_state()
    ((again,), _) = weigh(weighter("grpo", override), [batch], 1)  # as a process that resumes at step 1
    assert again.equal(second)
    assert torch.random.get_rng_state().equal(before)  # the model's own chance is not touched
    ((other,), _) = weigh(weighter("grpo", override, seed=2), [batch], 1)
    assert not other.equal(second)


def test_what_is_told():
    _, facts = weigh(weighter("critic", "normalise=mean1_clip", "max=1.05", "min=0.9"), [make_batch()])
    assert {f"weight_{what}" for what in ("mean", "std", "min", "max", "entropy", "clip_ratio")} <= facts.keys()
    assert {"td_error_mean", "td_error_std", "advantage_ema_mean", "advantage_ema_std"} <= facts.keys()
    assert 0 < facts["weight_clip_ratio"] <= 1
    assert 0 < facts["advantage_clip_ratio"] <= 1
    assert facts["weight_min"] >= 0.9 - 1e-6
    assert facts["weight_max"] == pytest.approx(1.05)
    _, facts = weigh(weighter("uniform"), [make_batch()])
    assert set(facts) == {f"weight_{what}" for what in ("mean", "std", "min", "max", "entropy")}
    _, facts = weigh(weighter("gradient"), [make_batch()])
    assert {
        f"importance_head_{k}_{of}" for k in (1, 2) for of in ("mean", "std", "ema_mean", "ema_std")
    } <= facts.keys()


def test_weights_that_are_all_zero_are_an_error_before_the_policy_runs():
    batch = make_batch()
    batch.columns["reward"].fill_(-3)
    made = weighter("critic", "min=0", "critic.beta=1e-3", "critic.whiten=none")
    said = r"nothing could be learned: .* weighting.family=critic\) -> raise weighting.min"
    with pytest.raises(InputError, match=said):
        made.begin(0, [batch], [targets_of(batch)])


@pytest.mark.parametrize("family", BY_HEAD)
def test_a_policy_that_has_diverged_is_left_to_the_loop(family):
    batch = make_batch()
    (asked,) = weighter(family).begin(0, [batch], [targets_of(batch)])
    head = next(heads_of(batch))
    tokens = head.look()
    tokens.cross_entropy[0, 2] = float("nan")
    head = dataclasses.replace(head, look=lambda: tokens)
    assert asked(head).equal(torch.ones(ROWS, TIME))


@pytest.mark.parametrize("family", [*UPFRONT, *BY_HEAD])
def test_a_step_without_any_label(family):
    batch = make_batch()
    batch.labels.fill_(IGNORE)
    ((found,), facts) = weigh(weighter(family), [batch])
    assert (found == 0).all()
    assert "weight_mean" not in facts
