import math

import pytest
import torch
import torch.nn.functional as F

from tests.weighting.reference import gradient_of_cross_entropy, norm
from wmtp_worker.weighting import gradient


def test_the_norm_by_hand():
    # p = (1/2, 1/2), label 0: (-1/2, 1/2)
    found = gradient.logit_gradient_norm(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
    assert float(found) == pytest.approx(math.sqrt(0.5))


def test_it_is_what_autograd_finds():
    logits = (torch.randn(6, 11, generator=torch.Generator().manual_seed(0)) * 3).requires_grad_()
    targets = torch.tensor([0, 5, 10, 3, 3, 7])
    F.cross_entropy(logits, targets, reduction="sum").backward()
    assert torch.allclose(gradient.logit_gradient_norm(logits, targets), logits.grad.norm(dim=-1), atol=1e-5)


def test_hidden_is_what_autograd_finds():
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(6, 4, generator=generator, requires_grad=True)
    unembedding = torch.randn(11, 4, generator=generator)
    targets = torch.tensor([0, 5, 10, 3, 3, 7])
    logits = hidden @ unembedding.T
    F.cross_entropy(logits, targets, reduction="sum").backward()
    found = gradient.hidden_gradient_norm(logits, targets, unembedding)
    assert torch.allclose(found, hidden.grad.norm(dim=-1), atol=1e-5)


def test_against_the_slow_reference():
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(2)) * 4
    targets = [6, 0, 2, 2, 1]
    found = gradient.logit_gradient_norm(logits, torch.tensor(targets))
    expected = [norm(gradient_of_cross_entropy(row, y)) for row, y in zip(logits.tolist(), targets, strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_what_is_learned_weighs_nothing_and_stays_finite():
    logits = torch.tensor([[100.0, 0.0, 0.0], [0.0, 100.0, 0.0]])
    found = gradient.logit_gradient_norm(logits, torch.tensor([0, 0]))
    assert found.tolist() == pytest.approx([0.0, math.sqrt(2)])


def test_positions_without_a_label_have_no_gradient():
    logits = torch.full((2, 3), float("nan"))
    targets = torch.tensor([-100, -100])
    assert gradient.logit_gradient_norm(logits, targets).tolist() == [0, 0]
    assert gradient.hidden_gradient_norm(logits, targets, torch.ones(3, 2)).tolist() == [0, 0]


def test_weights_by_hand():
    importance = torch.tensor([0.2, 0.4, 5.0]).view(1, 3, 1)
    labelled = torch.ones(1, 3, 1, dtype=torch.bool)
    found = gradient.weights(importance, labelled, mean=0.4, std=0.1, outlier=2.0)
    assert found.flatten().tolist() == pytest.approx([0.5, 1.0, 1.5])


@pytest.mark.parametrize("mean", [0.0, 0.5])
def test_nothing_left_to_learn_is_uniform(mean):
    labelled = torch.tensor([True, False]).view(1, 2, 1)
    assert gradient.weights(torch.zeros(1, 2, 1), labelled, mean, 0.0, 3.0).flatten().tolist() == [1.0, 0.0]


def test_more_positions_than_are_looked_at_together():
    generator = torch.Generator().manual_seed(3)
    logits, targets = torch.randn(2, 700, 5, generator=generator), torch.randint(-1, 5, (2, 700), generator=generator)
    expected = (logits.softmax(-1) - F.one_hot(targets.clamp(min=0), 5)).norm(dim=-1).where(targets >= 0, 0)
    assert torch.allclose(gradient.logit_gradient_norm(logits, targets), expected, atol=1e-6)
    unembedding = torch.randn(5, 3, generator=generator)
    expected = ((logits.softmax(-1) - F.one_hot(targets.clamp(min=0), 5)) @ unembedding).norm(dim=-1)
    found = gradient.hidden_gradient_norm(logits, targets, unembedding)
    assert torch.allclose(found, expected.where(targets >= 0, 0), atol=1e-6)
