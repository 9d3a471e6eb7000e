import torch

from tests.weighting.reference import softmax
from wmtp_worker.training.loss import mtp_labels
from wmtp_worker.weighting.spans import ahead, sequence_counts, sequence_softmax, sequences


def test_head_k_at_position_t_is_about_token_t_plus_k():
    values = torch.tensor([[10.0, 11.0, 12.0, 13.0]])
    assert ahead(values, 2).tolist() == [[[11.0, 12.0], [12.0, 13.0], [13.0, 0.0], [0.0, 0.0]]]


def test_the_same_alignment_as_the_labels():
    ids = torch.arange(100, 112).view(2, 6)
    targets = mtp_labels(ids, torch.ones_like(ids), heads=3)
    assert torch.equal(ahead(ids, 3)[targets != -100], targets[targets != -100])


def test_sequences_of_different_rows_are_different():
    numbers = sequences(torch.tensor([[1, 1, 2, 0], [1, 2, 2, 0]]))
    assert len(set(numbers.flatten().tolist())) == 6
    assert numbers[0, 0] == numbers[0, 1]
    assert numbers[1, 1] == numbers[1, 2]


def test_softmax_inside_each_sequence(batch):
    segments, labelled = batch
    scores = torch.randn(labelled.shape, generator=torch.Generator().manual_seed(0)) * 50
    sequence = sequences(segments)
    out = sequence_softmax(scores, labelled, sequence)
    assert (out[~labelled] == 0).all()
    for number in sequence.unique():
        for k in range(labelled.shape[-1]):
            mask = (sequence == number) & labelled[..., k]
            if mask.any():
                expected = torch.tensor(softmax(scores[..., k][mask].tolist()))
                assert torch.allclose(out[..., k][mask], expected, atol=1e-6)


def test_counts_of_each_sequence(batch):
    segments, labelled = batch
    sequence = sequences(segments)
    counts = sequence_counts(labelled, sequence)
    for row, t, k in labelled.nonzero().tolist():
        assert counts[row, t, k] == int(((sequence == sequence[row, t]) & labelled[..., k]).sum())
