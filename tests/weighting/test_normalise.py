import random

import pytest
import torch

from tests.weighting.reference import mean1_clip
from wmtp_worker.weighting.normalise import normalise

ALL = torch.ones(1, 4, 1, dtype=torch.bool)


def column(*values):
    return torch.tensor(values).view(1, -1, 1)


def test_mean1_by_hand():
    assert normalise(column(1.0, 2.0, 3.0, 2.0), ALL, "mean1").flatten().tolist() == [0.5, 1.0, 1.5, 1.0]


def test_clipped_by_hand():
    # s = 2: 2·(0.5, 0.5, 0.5, 10) clipped at 1.5 is (…, 1.5): the mean of (x, x, x, 1.5) is 1 for x = 2.5/3
    found = normalise(column(0.5, 0.5, 0.5, 10.0), ALL, "mean1_clip", 0.1, 1.5).flatten().tolist()
    assert found == pytest.approx([2.5 / 3] * 3 + [1.5])


@pytest.mark.parametrize("seed", range(20))
def test_mean_and_bounds_hold_at_once(seed):
    rng = random.Random(seed)
    values = [rng.choice([rng.lognormvariate(0, 3), 0.0, 1.0]) for _ in range(rng.randint(2, 30))]
    if not any(values):
        values[0] = 1.0
    low, high = rng.choice([0.0, 0.1, 0.9]), rng.choice([1.1, 3.0, 100.0])
    mask = torch.ones(1, len(values), 1, dtype=torch.bool)
    found = normalise(column(*values), mask, "mean1_clip", low, high).flatten()
    assert found.min() >= low
    assert found.max() <= high
    assert found.tolist() == pytest.approx(mean1_clip(values, low, high), rel=1e-4, abs=1e-5)


def test_what_has_no_label_counts_for_nothing():
    mask = torch.tensor([True, False, True, False]).view(1, 4, 1)
    found = normalise(column(1.0, float("nan"), 3.0, float("inf")), mask, "mean1")
    assert found.flatten().tolist() == [0.5, 0.0, 1.5, 0.0]


@pytest.mark.parametrize("how", ["mean1", "mean1_clip"])
def test_scale_does_not_matter(how):
    weights = column(0.3, 2.0, 0.01, 5.0)
    for factor in (1e-20, 1.0, 1e20):
        found = normalise(weights * factor, ALL, how, 0.1, 2.0)
        assert torch.allclose(found, normalise(weights, ALL, how, 0.1, 2.0), rtol=1e-5)
        assert float(found.mean()) == pytest.approx(1)


def test_none_is_none():
    assert normalise(column(5.0, 0.0, 7.0, 1.0), ALL, "none").flatten().tolist() == [5.0, 0.0, 7.0, 1.0]


def test_no_label_at_all():
    assert normalise(column(1.0, 1.0, 1.0, 1.0), torch.zeros_like(ALL), "mean1").sum() == 0


@pytest.mark.parametrize("how", ["mean1", "mean1_clip", "none"])
@pytest.mark.parametrize("values", [(0.0, 0.0, 0.0, 0.0), (1.0, float("nan"), 1.0, 1.0), (1.0, float("inf"), 1.0, 1.0)])
def test_weights_that_teach_nothing(values, how):
    with pytest.raises(ValueError, match="the mean of 4 weights is"):
        normalise(column(*values), ALL, how, 0.1, 2.0)


def test_bf16_and_gradient():
    weights = column(1.0, 2.0, 3.0, 2.0).bfloat16().requires_grad_()
    found = normalise(weights, ALL, "mean1")
    assert found.dtype == torch.float32
    assert not found.requires_grad
