"""What holds for every family alike."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wmtp_worker.weighting import (
    critic,
    gradient,
    grpo,
    random_matched,
    rho1_tokenskip,
    rho1_weighted,
    shuffled,
    uniform,
)
from wmtp_worker.weighting.spans import sequences


def of_tokens(score):
    """A quantity of (position, head) as one of tokens: that of head 1."""
    return score[..., 0]


# name -> (score [b, t, k], labelled, segments) -> weights
FAMILIES = {
    "uniform": lambda score, labelled, segments: uniform.weights(labelled),
    "critic": lambda score, labelled, segments: critic.weights(of_tokens(score), labelled, 0.5, 0.1, 10.0),
    "critic_heads": lambda score, labelled, segments: critic.head_softmax(of_tokens(score), labelled, 0.5),
    "rho1_weighted": lambda score, labelled, segments: rho1_weighted.weights(
        score, labelled, sequences(segments), 0.7, -1.0
    ),
    "rho1_tokenskip": lambda score, labelled, segments: rho1_tokenskip.weights(score, labelled, 0.6),
    "grpo": lambda score, labelled, segments: critic.exponential(
        score - 0.1 * grpo.kl_penalty(score, score.detach().float() / 2), labelled, 0.5, 0.1, 10.0
    ),
    "gradient": lambda score, labelled, segments: gradient.weights(score.abs(), labelled, 0.5, 0.2, 3.0),
    "shuffled": lambda score, labelled, segments: shuffled.weights(
        score.abs().where(labelled, 0), labelled, sequences(segments), torch.Generator().manual_seed(1)
    ),
    "random_matched": lambda score, labelled, segments: random_matched.weights(
        score.abs().where(labelled, 0), labelled, torch.Generator().manual_seed(1)
    ),
}
CHANCE = ("shuffled", "random_matched")
every_family = pytest.mark.parametrize("family", FAMILIES)


def scores(labelled, seed=0):
    return torch.randn(labelled.shape, generator=torch.Generator().manual_seed(seed)) * 2


@every_family
def test_shape_dtype_gradient_and_mask(family, batch):
    segments, labelled = batch
    score = scores(labelled).requires_grad_()
    found = FAMILIES[family](score, labelled, segments)
    assert found.shape == labelled.shape
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert (found[~labelled] == 0).all()
    assert (found >= 0).all()
    assert torch.isfinite(found).all()


@every_family
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_what_stands_without_a_label_has_no_influence(family, batch, poison):
    segments, labelled = batch
    score = scores(labelled)
    poisoned = score.masked_fill(~labelled, poison)
    if family.startswith("critic"):  # of tokens: poison only what no head is about
        about = torch.zeros(labelled.shape[:2], dtype=torch.bool)
        for row, t, k in labelled.nonzero().tolist():
            about[row, t + k + 1] = True
        poisoned = score.masked_fill(~about[..., None], poison)
    assert FAMILIES[family](poisoned, labelled, segments).equal(FAMILIES[family](score, labelled, segments))


# chance is drawn in the order of the rows
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - set(CHANCE)))
def test_the_order_of_rows_does_not_matter(family, batch):
    segments, labelled = batch
    score = scores(labelled)
    order = torch.tensor([2, 0, 1])
    found = FAMILIES[family](score, labelled, segments)
    again = FAMILIES[family](score[order], labelled[order], segments[order])
    assert torch.allclose(again, found[order])


@every_family
def test_equal_scores_give_equal_weights(family, batch):
    segments, labelled = batch
    found = FAMILIES[family](torch.full(labelled.shape, 0.3), labelled, segments)[labelled]
    if family == "rho1_tokenskip":
        assert set(found.tolist()) == {0.0, 1.0}  # a share is kept, whatever the scores
    elif len(found):
        assert torch.allclose(found, found[:1].expand_as(found))


@every_family
def test_bf16_scores(family, batch):
    segments, labelled = batch
    score = scores(labelled).bfloat16()
    found = FAMILIES[family](score, labelled, segments)
    assert found.equal(FAMILIES[family](score.float(), labelled, segments))


@every_family
def test_a_single_token(family):
    labelled = torch.zeros(1, 2, 1, dtype=torch.bool)
    labelled[0, 0, 0] = True
    found = FAMILIES[family](torch.full((1, 2, 1), 0.7), labelled, torch.ones(1, 2, dtype=torch.int64))
    assert found[0, 0, 0] > 0
    assert found[0, 1, 0] == 0


@every_family
@settings(max_examples=20, deadline=None)
@given(values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=6, max_size=6))
def test_no_finite_score_gives_anything_but_finite_weights(family, values):
    labelled = torch.ones(1, 6, 1, dtype=torch.bool)
    labelled[0, -1] = False
    found = FAMILIES[family](torch.tensor(values).view(1, 6, 1), labelled, torch.ones(1, 6, dtype=torch.int64))
    assert torch.isfinite(found).all()


def test_a_larger_score_never_weighs_less(batch):
    segments, labelled = batch
    score = scores(labelled)
    for family in ("critic", "rho1_weighted", "rho1_tokenskip"):
        for row, t, k in labelled.nonzero().tolist()[:6]:
            where = (row, t + k + 1, 0) if family == "critic" else (row, t, k)
            more = score.clone()
            more[where] += 1.5
            before, after = FAMILIES[family](score, labelled, segments), FAMILIES[family](more, labelled, segments)
            assert after[row, t, k] >= before[row, t, k] - 1e-6


def test_grpo_weighs_through_the_critics_exponential():
    advantages = grpo.group_advantages(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]))
    tokens = advantages[torch.tensor([[0, 0, 1, 1]])]
    labelled = torch.ones(1, 4, 1, dtype=torch.bool)
    found = critic.weights(tokens, labelled, beta=1.0, low=0.1, high=10.0).flatten()
    assert found[0] == pytest.approx(math.e, rel=1e-3)
    assert found[1] == pytest.approx(1 / math.e, rel=1e-3)
