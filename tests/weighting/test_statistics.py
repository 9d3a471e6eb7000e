import math
import statistics

import pytest
import torch

from wmtp_worker.weighting.statistics import Moments, MovingAverage, whiten


def test_moments_of_what_is_marked():
    values = torch.tensor([1.0, 2.0, math.nan, 5.0])
    found = Moments.of(values, torch.tensor([True, True, False, True]))
    assert found.mean == pytest.approx(8 / 3)
    assert found.std == pytest.approx(statistics.pstdev([1, 2, 5]))


def test_moments_add_up_over_micro_batches():
    values = torch.randn(100, generator=torch.Generator().manual_seed(0))
    every = torch.ones(50, dtype=torch.bool)
    whole = Moments.of(values, torch.ones(100, dtype=torch.bool))
    parts = Moments.of(values[:50], every) + Moments.of(values[50:], every)
    assert (parts.count, parts.mean, parts.std) == pytest.approx((100, whole.mean, whole.std))


def test_moments_of_nothing():
    assert (Moments().mean, Moments().std) == (0, 0)


def test_the_moving_average_by_hand():
    average = MovingAverage(decay=0.9)
    average = average.updated(Moments(2, 6.0, 20.0))  # mean 3, mean of squares 10
    assert (average.mean, average.std) == pytest.approx((3.0, 1.0))  # no bias after the first batch
    average = average.updated(Moments(1, 1.0, 1.0))
    # (0.9*0.1*3 + 0.1*1) / (1 - 0.81), and the same of 10 and 1
    assert average.mean == pytest.approx((0.27 + 0.1) / 0.19)
    assert average.std == pytest.approx(math.sqrt((0.9 + 0.1) / 0.19 - (0.37 / 0.19) ** 2))


def test_a_batch_without_values_changes_no_average():
    average = MovingAverage(0.9).updated(Moments(1, 2.0, 4.0))
    assert average.updated(Moments()) == average


def test_whitening_gives_mean_0_and_deviation_1():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(1)) * 7 + 3
    white = whiten(values, float(values.mean()), float(values.std(correction=0)))
    assert float(white.mean()) == pytest.approx(0, abs=1e-5)
    assert float(white.std(correction=0)) == pytest.approx(1, abs=1e-5)


def test_equal_values_whiten_to_0():
    assert whiten(torch.full((5,), 1e6), 1e6, 1e-9).tolist() == [0.0] * 5
