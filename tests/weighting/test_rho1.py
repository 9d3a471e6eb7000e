import math

import pytest
import torch

from tests.weighting.reference import softmax, top_share
from wmtp_worker.weighting import rho1_tokenskip, rho1_weighted
from wmtp_worker.weighting.spans import sequences


def column(*values):
    return torch.tensor(values).view(1, -1, 1)


ALL = torch.ones(1, 4, 1, dtype=torch.bool)
ONE = torch.ones(1, 4, dtype=torch.int64)


def test_excess_loss_by_hand():
    assert rho1_weighted.excess_loss(column(3.0, 1.0), column(1.0, 2.5)).flatten().tolist() == [2.0, -1.5]


def test_weighted_by_hand():
    # e^(0, ln 2, ln 3, ln 2) = 1, 2, 3, 2 of 8, times 4
    found = rho1_weighted.weights(column(0.0, math.log(2), math.log(3), math.log(2)), ALL, ONE, temperature=1.0)
    assert found.flatten().tolist() == pytest.approx([0.5, 1.0, 1.5, 1.0])


def test_the_minimum_makes_what_is_below_equal():
    found = rho1_weighted.weights(column(-5.0, -1.0, 0.2, 3.0), ALL, ONE, temperature=1.0, minimum=0.5).flatten()
    assert found[0] == found[1] == found[2] < found[3]


def test_weighted_against_the_slow_reference(batch):
    segments, labelled = batch
    excess = torch.randn(labelled.shape, generator=torch.Generator().manual_seed(3)) * 4
    sequence = sequences(segments)
    found = rho1_weighted.weights(excess, labelled, sequence, temperature=0.5, minimum=-1.0)
    for number in sequence.unique():
        for k in range(labelled.shape[-1]):
            mask = (sequence == number) & labelled[..., k]
            if mask.any():
                scores = [max(e, -1.0) / 0.5 for e in excess[..., k][mask].tolist()]
                expected = [len(scores) * share for share in softmax(scores)]
                assert found[..., k][mask].tolist() == pytest.approx(expected, abs=1e-4)
    assert (found[~labelled] == 0).all()


def test_temperature_between_uniform_and_one_token():
    excess = column(0.1, 0.4, 0.2, 0.3)
    assert rho1_weighted.weights(excess, ALL, ONE, 1e6).flatten().tolist() == pytest.approx([1.0] * 4, abs=1e-4)
    assert rho1_weighted.weights(excess, ALL, ONE, 1e-4).flatten().tolist() == pytest.approx([0, 4, 0, 0], abs=1e-4)


def test_tokenskip_by_hand():
    found = rho1_tokenskip.weights(column(0.1, -3.0, 2.0, 0.5), ALL, share=0.5)
    assert found.flatten().tolist() == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("share", [0.01, 0.33, 0.6, 1.0])
def test_tokenskip_against_the_slow_reference(batch, share):
    _, labelled = batch
    excess = torch.randint(-3, 4, labelled.shape, generator=torch.Generator().manual_seed(4)).float()  # many equal ones
    found = rho1_tokenskip.weights(excess, labelled, share)
    for k in range(labelled.shape[-1]):
        mask = labelled[..., k]
        assert found[..., k][mask].tolist() == top_share(excess[..., k][mask].tolist(), share)
    assert (found[~labelled] == 0).all()
