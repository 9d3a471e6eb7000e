import math

import pytest
import torch

from tests.weighting.reference import group_advantages
from wmtp_worker.weighting import grpo


def test_advantages_by_hand():
    # group 0: 1, 0, 0, 1 has mean 1/2 and deviation 1/2; group 1 has one member
    found = grpo.group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 0, 0, 1]))
    assert found.tolist() == pytest.approx([1.0, -1.0, -1.0, 1.0, 0.0], abs=1e-3)


def test_against_the_slow_reference():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(30, generator=generator)
    groups = torch.randint(0, 6, (30,), generator=generator)
    expected = group_advantages(rewards.tolist(), groups.tolist())
    assert grpo.group_advantages(rewards, groups).tolist() == pytest.approx(expected, abs=1e-4)


def test_neither_order_nor_scale_nor_shift_of_rewards_matters():
    rewards = torch.tensor([1.0, 0.0, 0.5, 3.0, 1.0])
    groups = torch.tensor([0, 0, 0, 1, 1])
    found = grpo.group_advantages(rewards, groups)
    order = torch.tensor([4, 2, 0, 3, 1])
    assert torch.allclose(grpo.group_advantages(rewards[order], groups[order]), found[order])
    assert torch.allclose(grpo.group_advantages(rewards * 10 + 5, groups), found, atol=1e-3)


def test_equal_rewards_say_nothing():
    assert grpo.group_advantages(torch.full((4,), 0.1), torch.zeros(4, dtype=torch.int64)).tolist() == [0.0] * 4


def test_kl_by_hand():
    # log π = -1, log π_ref = -2: d = -1, e^-1 + 1 - 1
    found = grpo.kl_penalty(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 2.0]))
    assert found.tolist() == pytest.approx([math.exp(-1), 0.0])


def test_kl_against_the_slow_reference():
    generator = torch.Generator().manual_seed(1)
    policy, reference = (torch.rand(20, generator=generator) * 4 for _ in range(2))
    expected = []
    for ours, theirs in zip(policy.tolist(), reference.tolist(), strict=True):
        ratio = math.exp(-theirs) / math.exp(-ours)  # π_ref / π
        expected.append(ratio - 1 - math.log(ratio))
    assert grpo.kl_penalty(policy, reference).tolist() == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_kl_is_never_negative_nor_infinite():
    found = grpo.kl_penalty(torch.tensor([0.0, 1e9, 3.0]), torch.tensor([1e9, 0.0, 3.1]))
    assert torch.isfinite(found).all()
    assert (found >= 0).all()
