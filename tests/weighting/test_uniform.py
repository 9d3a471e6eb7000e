"""Uniform weights, and what every family promises about its result."""

import torch

from wmtp_worker.weighting import uniform


def test_one_where_there_is_a_label_zero_elsewhere():
    labelled = torch.tensor([[[True, False], [False, False], [True, True]]])
    weights = uniform.weights(labelled)
    assert weights.tolist() == [[[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]]
    assert weights.dtype == torch.float32
    assert weights.shape == labelled.shape
    assert not weights.requires_grad
