import math

import pytest
import torch

from tests.weighting.reference import entropy
from wmtp_worker.weighting.summary import clipped_share, summarise

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
    assert clipped_share(weights, MASK, 0.1, 5.0) == pytest.approx(2 / 3)
