import pytest
import torch

from tests.weighting.reference import exp_clipped, gae, lambda_returns, softmax, td_errors
from wmtp_worker.weighting import critic
from wmtp_worker.weighting.spans import ahead


def rows(*values):
    return torch.tensor([list(values)])


def test_td_errors_by_hand():
    # one sequence, γ = 0.9, reward 1 at its end: δ_1 = 0.9·0.5 - 0.2, δ_2 = 1 - 0.5
    found = critic.td_errors(rows(0.2, 0.5, 0.7), rows(0.0, 0.0, 1.0), rows(1, 1, 1), gamma=0.9)
    assert found.flatten().tolist() == pytest.approx([0.0, 0.25, 0.5])


def test_advantages_by_hand():
    # γλ = 0.5: A_2 = 0.5, A_1 = 0.25 + 0.25, A_0 = 0 + 0.25
    found = critic.gae(rows(0.0, 0.25, 0.5), rows(1, 1, 1), gamma=1.0, lam=0.5)
    assert found.flatten().tolist() == pytest.approx([0.25, 0.5, 0.5])


def test_a_sum_of_td_errors_is_reward_minus_first_value():
    # γ = λ = 1: A_1 = R - V_0, whatever lies between (the sum telescopes)
    values = torch.randn(1, 40, generator=torch.Generator().manual_seed(0))
    rewards = torch.zeros(1, 40)
    rewards[0, -1] = 3.0
    one = torch.ones(1, 40, dtype=torch.int64)
    advantages = critic.gae(critic.td_errors(values, rewards, one), one, lam=1.0)
    assert float(advantages[0, 1]) == pytest.approx(3.0 - float(values[0, 0]), abs=1e-5)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 1.0), (0.99, 0.0), (1.0, 1.0)])
def test_against_the_slow_reference(batch, gamma, lam):
    segments, _ = batch
    generator = torch.Generator().manual_seed(7)
    values = torch.randn(segments.shape, generator=generator)
    rewards = torch.zeros(segments.shape)
    spans = []
    for row in range(len(segments)):
        start = 0
        for t in range(segments.shape[1]):
            if t + 1 == segments.shape[1] or segments[row, t + 1] != segments[row, t]:
                rewards[row, t] = torch.randn((), generator=generator)
                spans.append((row, start, t + 1))
                start = t + 1
    errors = critic.td_errors(values, rewards, segments, gamma)
    advantages = critic.gae(errors, segments, gamma, lam)
    returns = critic.lambda_returns(values, rewards, segments, gamma, lam)
    for row, start, end in spans:
        forward = lambda_returns(values[row, start:end].tolist(), rewards[row, start:end].tolist(), gamma, lam)
        assert returns[row, start:end].tolist() == pytest.approx(forward, abs=1e-4)
        expected = td_errors(values[row, start:end].tolist(), rewards[row, start:end].tolist(), gamma)
        assert errors[row, start:end].tolist() == pytest.approx(expected, abs=1e-5)
        assert advantages[row, start:end].tolist() == pytest.approx(gae(expected, gamma, lam), abs=1e-4)


def test_lambda_returns_by_hand():
    # γ = 0.9, λ = 0.5, V = 0.2, 0.5, 0.7, reward 1: G_1 = 1, G_0 = 0.9·(0.5·0.5 + 0.5·G_1), and the end has the reward
    found = critic.lambda_returns(rows(0.2, 0.5, 0.7), rows(0.0, 0.0, 1.0), rows(1, 1, 1), gamma=0.9, lam=0.5)
    assert found.flatten().tolist() == pytest.approx([0.675, 1.0, 1.0])
    # λ = 0: one step ahead; λ = 1: the discounted reward, whatever the values are
    one_step = critic.lambda_returns(rows(0.2, 0.5, 0.7), rows(0.0, 0.0, 1.0), rows(1, 1, 1), gamma=0.9, lam=0.0)
    assert one_step.flatten().tolist() == pytest.approx([0.45, 1.0, 1.0])
    whole = critic.lambda_returns(rows(0.2, 0.5, 0.7), rows(0.0, 0.0, 1.0), rows(1, 1, 1), gamma=0.9, lam=1.0)
    assert whole.flatten().tolist() == pytest.approx([0.9, 1.0, 1.0])


def test_weights_by_hand():
    labelled = torch.ones(1, 3, 1, dtype=torch.bool)
    labelled[0, 2] = False
    found = critic.weights(rows(9.0, 0.0, 1.0), labelled, beta=0.5, low=0.1, high=5.0)
    # head 1 at position 0 is about token 1 (A = 0), at position 1 about token 2: exp(2) > 5
    assert found.flatten().tolist() == pytest.approx([1.0, 5.0, 0.0])


def test_weights_against_the_slow_reference(batch):
    _, labelled = batch
    advantages = torch.randn(labelled.shape[:2], generator=torch.Generator().manual_seed(1)) * 3
    found = critic.weights(advantages, labelled, beta=0.7, low=0.05, high=20.0)
    for row, t, k in labelled.nonzero().tolist():
        expected = exp_clipped(float(advantages[row, t + k + 1]), 0.7, 0.05, 20.0)
        assert float(found[row, t, k]) == pytest.approx(expected, rel=1e-5)
    assert (found[~labelled] == 0).all()


@pytest.mark.parametrize("extreme", [1e30, -1e30])
def test_extreme_advantages_stay_inside_the_bounds(extreme):
    labelled = torch.ones(1, 3, 1, dtype=torch.bool)
    found = critic.weights(torch.full((1, 3), extreme), labelled, beta=1e-3, low=0.1, high=10.0)
    assert torch.isfinite(found).all()
    assert found[0, 0, 0] == pytest.approx(10.0 if extreme > 0 else 0.1)


def test_heads_share_what_a_position_weighs(batch):
    _, labelled = batch
    advantages = torch.randn(labelled.shape[:2], generator=torch.Generator().manual_seed(2)) * 5
    found = critic.head_softmax(advantages, labelled, beta=0.5)
    scores = ahead(advantages, labelled.shape[-1]) / 0.5
    for row in range(len(labelled)):
        for t in range(labelled.shape[1]):
            mask = labelled[row, t]
            if mask.any():
                expected = [int(mask.sum()) * share for share in softmax(scores[row, t][mask].tolist())]
                assert found[row, t][mask].tolist() == pytest.approx(expected, abs=1e-5)
    assert (found[~labelled] == 0).all()


def test_equal_advantages_are_uniform(batch):
    _, labelled = batch
    same = torch.full(labelled.shape[:2], 2.5)
    assert torch.allclose(critic.head_softmax(same, labelled, beta=0.1), labelled.float())
