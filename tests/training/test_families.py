"""Each family gets what it weighs by, at the right positions."""

import dataclasses
import math

import pytest
import torch

from wmtp_worker.data.packing import IGNORE, Batch
from wmtp_worker.settings import load
from wmtp_worker.training.families import Memory, after_the_policy, before_the_policy
from wmtp_worker.training.linear_cross_entropy import LinearCrossEntropy
from wmtp_worker.training.loss import Head, mtp_labels
from wmtp_worker.weighting import critic
from wmtp_worker.weighting.statistics import Moments, MovingAverage, whiten

# two samples of 5 and 3 tokens, the first of each its prompt; two tokens of padding
SEGMENTS = torch.tensor([[1, 1, 1, 1, 1, 2, 2, 2, 0, 0]])
TOKENS = torch.tensor([[7, 1, 2, 3, 4, 8, 5, 6, 0, 0]])
FIRST = torch.tensor([[0, 5, 8, 9]])


def settings(family, *overrides):
    chosen = (f"weighting.family={family}", "weighting.reference=/m", "weighting.critic.value=/v", "data.solutions=all")
    return load(overrides=[*chosen, *(f"weighting.{text}" for text in overrides)], environ={}).weighting


def make_batch(**columns):
    labels = TOKENS.clone()
    labels[0, FIRST[0]] = IGNORE
    return Batch(TOKENS, labels, torch.zeros_like(TOKENS), SEGMENTS, columns)


def make_head(batch, number, losses=None, logits=None, unembedding=None):
    targets = mtp_labels(batch.labels, batch.segment_ids, number)[..., -1]
    logits = torch.zeros(*targets.shape, 9) if logits is None else logits
    tokens = LinearCrossEntropy(logits, torch.eye(9) if unembedding is None else unembedding, targets).tokens()
    if losses is not None:
        tokens = dataclasses.replace(tokens, cross_entropy=losses.where(targets != IGNORE, 0))
    return Head(number, batch, targets, lambda: tokens)


def raw(weighting, head, memory=None):
    return after_the_policy(weighting, head, memory or Memory(0.9, 0))[0, :, 0].tolist()


def tokens(*values):
    return torch.tensor([[*values]], dtype=torch.float32)


@pytest.mark.parametrize("number", [1, 2])
def test_a_head_compares_its_loss_with_the_reference_of_the_token_that_it_predicts(number):
    # the reference knows token 3 perfectly, all others not at all: whoever predicts it has the largest excess
    batch = make_batch(reference_loss=tokens(0, 9, 9, 0, 9, 0, 9, 9, 0, 0))
    head = make_head(batch, number, losses=torch.full((1, 10), 3.0))
    kept = raw(settings("rho1_tokenskip", "rho1.share=0.1"), head)
    assert [position for position, weight in enumerate(kept) if weight] == [3 - number]


def test_rho1_weighted_by_hand():
    # excess 0, ln 2, ln 3, 0 in the first sample (head 1), below the minimum of 0 in the second
    batch = make_batch(reference_loss=tokens(0, 1, 1, 1, 1, 0, 5, 6, 0, 0))
    losses = tokens(1, 1 + math.log(2), 1 + math.log(3), 1, 0, 1, 1, 0, 0, 0)
    found = raw(settings("rho1_weighted"), make_head(batch, 1, losses))
    assert found == pytest.approx([4 / 7, 8 / 7, 12 / 7, 4 / 7, 0, 1, 1, 0, 0, 0])


def test_gradient_by_hand():
    # half the mass on the label: ‖(1/2, -1/2)‖; all of it elsewhere: √2
    batch, logits = make_batch(), torch.full((1, 10, 9), -1e4)
    for position, token in enumerate(TOKENS[0, 1:].tolist()):
        logits[0, position, [0] if position == 6 else [token, 0]] = 0
    found = raw(settings("gradient", "gradient.outlier=100"), make_head(batch, 1, logits=logits))
    half, one = math.sqrt(0.5), math.sqrt(2)
    mean = (5 * half + one) / 6
    assert found == pytest.approx([half / mean] * 4 + [0, half / mean, one / mean, 0, 0, 0])


def test_gradient_of_hidden_states_knows_the_unembedding():
    batch = make_batch()
    # token 1 is unembedded along a far longer vector than the others
    unembedding = torch.eye(9)
    unembedding[1, 1] = 10
    head = make_head(batch, 1, unembedding=unembedding)
    found = raw(settings("gradient", "gradient.of=hidden", "gradient.outlier=100"), head)
    assert found[0] > 3 * found[1]
    assert found[1] == pytest.approx(found[2])
    assert raw(settings("gradient"), make_head(batch, 1))[0] == pytest.approx(1.0)


def test_importance_is_compared_with_that_of_earlier_steps_after_the_warm_up():
    batch, weighting = make_batch(), settings("gradient", "warmup=2", "gradient.outlier=100")
    memory = Memory(0.5, 2)
    sure, unsure = torch.zeros(1, 10, 9), torch.zeros(1, 10, 9)
    sure.scatter_(-1, TOKENS.roll(-1, 1)[..., None], torch.tensor([[[3.0], [4.0]] * 5]))
    for _ in range(2):
        found = raw(weighting, make_head(batch, 1, logits=sure), memory)
        assert sum(found) == pytest.approx(6)  # by its own mean
        memory.close_step()
    assert min(raw(weighting, make_head(batch, 1, logits=unsure), memory)[:4]) > 2  # by theirs
    assert set(memory.averages) == {"importance_head_1"}
    assert memory.averages["importance_head_1"].batches == 2


def test_critic_is_td_errors_gae_whitening_and_the_exponential_in_this_order():
    generator = torch.Generator().manual_seed(0)
    batches = [
        make_batch(value=torch.randn(1, 10, generator=generator), reward=tokens(0, 0, 0, 0, 1, 0, 0, 0, 0, 0))
        for _ in range(2)
    ]
    labelled = [mtp_labels(batch.labels, batch.segment_ids, 2) != IGNORE for batch in batches]
    weighting = settings("critic", "critic.whiten=batch", "critic.gamma=0.9", "critic.beta=0.7", "min=0.2", "max=3")
    memory = Memory(0.9, 0)
    found = before_the_policy(weighting, batches, labelled, memory)

    errors = [critic.td_errors(b.columns["value"], b.columns["reward"], SEGMENTS, 0.9) for b in batches]
    advantages = torch.cat([critic.gae(one, SEGMENTS, 0.9, 0.95) for one in errors])
    solution = torch.cat([batch.labels != IGNORE for batch in batches])
    chosen = advantages[solution]
    white = whiten(advantages, float(chosen.mean()), float(chosen.std(correction=0)))
    expected = critic.weights(white, torch.cat(labelled), 0.7, 0.2, 3.0)
    torch.testing.assert_close(torch.cat(found), expected)
    # prompts and padding have no part in the statistics
    assert memory.moments["td_error"].count == 12
    assert memory.moments["td_error"].mean == pytest.approx(float(torch.cat(errors)[solution].mean()))
    assert not memory.averaged


def test_critic_whitens_by_the_moving_average():
    batch = make_batch(value=tokens(*range(10)), reward=tokens(*[0] * 10))
    labelled = mtp_labels(batch.labels, batch.segment_ids, 1) != IGNORE
    weighting = settings("critic", "critic.lam=0", "max=100", "min=0.001")
    memory = Memory(0.9, 1, averages={"advantage": MovingAverage(0.9).updated(Moments(1, 3.0, 13.0))})  # 3 ± 2
    (found,) = before_the_policy(weighting, [batch], [labelled], memory)
    # every value is 1 above the one before: δ = 1, and -7 at the last token of the second sample
    assert found[0, 0, 0] == pytest.approx(math.exp((1 - 3) / 2))
    assert found[0, 6, 0] == pytest.approx(math.exp((-6 - 3) / 2))
    memory.close_step()
    assert memory.averages["advantage"].batches == 2


def test_critic_over_the_heads():
    batch = make_batch(value=tokens(0, 0, 0, 1, 1, 0, 0, 0, 0, 0), reward=tokens(*[0] * 10))
    labelled = mtp_labels(batch.labels, batch.segment_ids, 2) != IGNORE
    weighting = settings("critic", "critic.form=heads", "critic.whiten=none", "critic.lam=0")
    (found,) = before_the_policy(weighting, [batch], [labelled], Memory(0.9, 0))
    # at position 1 head 2 predicts token 3, where the value rises by 1, head 1 token 2, where it does not
    e = math.e
    assert found[0, 1].tolist() == pytest.approx([2 / (1 + e), 2 * e / (1 + e)])
    assert found[0, 0].tolist() == pytest.approx([1, 1])


def test_grpo_weighs_all_tokens_of_a_solution_by_its_advantage():
    batch = make_batch(advantage=tokens(1, 1, 1, 1, 1, -9, -9, -9, 0, 0))
    labelled = mtp_labels(batch.labels, batch.segment_ids, 2) != IGNORE
    weighting = settings("grpo", "grpo.beta=2", "grpo.clip=3", "min=0.01")
    (found,) = before_the_policy(weighting, [batch], [labelled], Memory(0.9, 0))
    assert found[0, :4, 0].tolist() == pytest.approx([math.exp(0.5)] * 4)
    assert found[0, 5:7, 0].tolist() == pytest.approx([math.exp(-1.5)] * 2)  # clipped at -3
    assert (found[~labelled[None][0]] == 0).all()


def test_grpo_with_kl_takes_off_what_departs_from_the_reference():
    advantage, reference = tokens(1, 1, 1, 1, 1, 0, 0, 0, 0, 0), tokens(0, 2, 2, 2, 2, 0, 2, 2, 0, 0)
    batch = make_batch(advantage=advantage, reference_loss=reference)
    weighting = settings("grpo", "grpo.kl=0.5", "min=0.01", "max=100")
    losses = torch.full((1, 10), 2.0)
    losses[0, 1] = 1.0  # of token 2: d = -1
    memory = Memory(0.9, 0)
    found = raw(weighting, make_head(batch, 1, losses), memory)
    assert found[0] == pytest.approx(math.e)
    assert found[1] == pytest.approx(math.exp(1 - 0.5 * math.exp(-1)))
    assert found[5] == pytest.approx(1)
    assert memory.moments["kl"].total == pytest.approx(math.exp(-1))


def test_grpo_takes_nothing_off_in_further_heads_which_see_less_than_the_reference():
    batch = make_batch(advantage=tokens(*[1.0] * 10), reference_loss=tokens(*[0.5] * 10))
    weighting, memory = settings("grpo", "grpo.kl=0.5", "min=0.01", "max=100"), Memory(0.9, 0)
    found = raw(weighting, make_head(batch, 2, torch.full((1, 10), 4.0)), memory)
    weighed = [weight for weight in found if weight]
    assert weighed == pytest.approx([math.e] * len(weighed))
    assert len(weighed) > 3
    assert "kl" not in memory.moments


def test_averages_take_in_what_was_asked_for_and_survive_json():
    memory = Memory(0.9, 0)
    memory.note("only_logged", Moments(1, 1.0, 1.0))
    memory.usual("kept", Moments(2, 6.0, 20.0))
    memory.usual("kept", Moments(2, 2.0, 2.0))
    memory.close_step()
    assert set(memory.averages) == {"kept"}
    assert memory.averages["kept"].mean == pytest.approx(2.0)
    assert memory.moments == {}
    restored = Memory(0.9, 0, {name: MovingAverage(**dataclasses.asdict(a)) for name, a in memory.averages.items()})
    assert restored.averages == memory.averages
