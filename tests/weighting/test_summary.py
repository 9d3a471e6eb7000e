import math

import pytest
import torch

from tests.weighting.reference import entropy
from wmtp_worker.weighting.summary import Summary, clipped


def summarise(weights, labelled):
    return Summary.of(weights, labelled).facts()


MASK = torch.tensor([True, True, True, False]).view(1, 4, 1)


def test_by_hand():
    found = summarise(torch.tensor([1.0, 1.0, 2.0, 9.0]).view(1, 4, 1), MASK)
    assert found["weight_mean"] == pytest.approx(4 / 3)
    assert found["weight_std"] == pytest.approx(math.sqrt(2) / 3)
    assert (found["weight_min"], found["weight_max"]) == (1.0, 2.0)
    # shares 1/4, 1/4, 1/2: 1.5 ln 2 of ln 3
    assert found["weight_entropy"] == pytest.approx(1.5 * math.log(2) / math.log(3))
    assert found["weight_entropy"] == pytest.approx(entropy([1.0, 1.0, 2.0]))


def test_entropy_from_one_token_to_uniform():
    assert summarise(torch.tensor([0.0, 7.0, 0.0, 0.0]).view(1, 4, 1), MASK)["weight_entropy"] == 0
    assert summarise(torch.ones(1, 4, 1), MASK)["weight_entropy"] == pytest.approx(1)
    only = torch.tensor([True, False]).view(1, 2, 1)
    assert summarise(torch.ones(1, 2, 1), only)["weight_entropy"] == 1


def test_nothing_labelled():
    assert summarise(torch.ones(1, 4, 1), torch.zeros_like(MASK)) == {}


def test_share_at_the_bounds():
    weights = torch.tensor([0.1, 5.0, 1.0, 5.0]).view(1, 4, 1)
    assert clipped(weights, MASK, 0.1, 5.0).mean == pytest.approx(2 / 3)


def test_parts_add_up_to_the_whole():
    weights = torch.rand(8, 5, 3, generator=torch.Generator().manual_seed(1)) + torch.arange(8.0)[:, None, None]
    labelled = torch.rand(weights.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    labelled[2:4] = False  # a rank may have nothing
    parts = [Summary.of(one, mask) for one, mask in zip(weights.split(2), labelled.split(2), strict=True)]
    together = sum(parts, Summary())
    whole = Summary.of(weights, labelled)
    assert together.count == whole.count
    assert together.facts() == pytest.approx(whole.facts(), rel=1e-12)
    assert summarise(torch.full((1, 4, 1), 3.0), MASK)["weight_std"] == 0
