import pytest
import torch

from wmtp_worker.weighting import gradient


def test_weights_by_hand():
    importance = torch.tensor([0.2, 0.4, 5.0]).view(1, 3, 1)
    labelled = torch.ones(1, 3, 1, dtype=torch.bool)
    found = gradient.weights(importance, labelled, mean=0.4, std=0.1, outlier=2.0)
    assert found.flatten().tolist() == pytest.approx([0.5, 1.0, 1.5])


def test_weights_against_the_slow_reference(batch):
    _, labelled = batch
    importance = torch.rand(labelled.shape, generator=torch.Generator().manual_seed(3)) * 2
    found = gradient.weights(importance, labelled, mean=0.7, std=0.3, outlier=1.5)
    for place in torch.cartesian_prod(*map(torch.arange, labelled.shape)).tolist():
        expected = min(float(importance[*place]), 0.7 + 1.5 * 0.3) / 0.7 if labelled[*place] else 0.0
        assert float(found[*place]) == pytest.approx(expected)


@pytest.mark.parametrize("mean", [0.0, 0.5])
def test_nothing_left_to_learn_is_uniform(mean):
    labelled = torch.tensor([True, False]).view(1, 2, 1)
    assert gradient.weights(torch.zeros(1, 2, 1), labelled, mean, 0.0, 3.0).flatten().tolist() == [1.0, 0.0]
