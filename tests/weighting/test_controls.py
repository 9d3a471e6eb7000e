import torch

from wmtp_worker.weighting import random_matched, shuffled
from wmtp_worker.weighting.spans import sequences


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_shuffling_keeps_the_weights_of_each_sequence_and_head(batch):
    segments, labelled = batch
    base = torch.rand(labelled.shape, generator=generator(9)) + 0.1
    sequence = sequences(segments)
    found = shuffled.weights(base, labelled, sequence, generator())
    assert (found[~labelled] == 0).all()
    for number in sequence.unique():
        for k in range(labelled.shape[-1]):
            mask = (sequence == number) & labelled[..., k]
            assert found[..., k][mask].sort().values.equal(base[..., k][mask].sort().values)


def test_shuffling_shuffles_every_order_alike():
    base = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1)
    labelled, one, source = torch.ones(1, 3, 1, dtype=torch.bool), torch.ones(1, 3, dtype=torch.int64), generator()
    seen: dict[tuple[float, ...], int] = {}
    for _ in range(1200):
        order = tuple(shuffled.weights(base, labelled, one, source).flatten().tolist())
        seen[order] = seen.get(order, 0) + 1
    assert len(seen) == 6
    assert min(seen.values()) > 140  # 200 expected, deviation 13


def test_the_same_seed_gives_the_same_weights(batch):
    segments, labelled = batch
    base = torch.rand(labelled.shape, generator=generator(9))
    sequence = sequences(segments)
    first = shuffled.weights(base, labelled, sequence, generator(5))
    assert first.equal(shuffled.weights(base, labelled, sequence, generator(5)))
    again = random_matched.weights(base, labelled, generator(5))
    assert again.equal(random_matched.weights(base, labelled, generator(5)))


def test_random_weights_have_the_distribution_of_the_base():
    base = torch.rand(1, 5000, 1, generator=generator(1)).square() * 4
    labelled = torch.rand(1, 5000, 1, generator=generator(2)) < 0.8
    found = random_matched.weights(base, labelled, generator(3))
    assert (found[~labelled] == 0).all()
    assert abs(found[labelled].mean() - base[labelled].mean()) < 0.06  # four standard errors
    assert abs(found[labelled].std() - base[labelled].std()) < 0.06
    assert set(found[labelled].tolist()) <= set(base[labelled].tolist())


def test_random_weights_do_not_know_the_base_position():
    base = torch.rand(1, 5000, 1, generator=generator(1))
    labelled = torch.ones(1, 5000, 1, dtype=torch.bool)
    found = random_matched.weights(base, labelled, generator(3))
    both = torch.stack([base.flatten(), found.flatten()])
    assert abs(float(torch.corrcoef(both)[0, 1])) < 0.06


def test_random_weights_are_not_all_zero_where_the_base_is_not():
    base, labelled = torch.zeros(1, 20, 1), torch.ones(1, 20, 1, dtype=torch.bool)
    assert random_matched.weights(base, labelled, generator()).sum() == 0
    base[0, 7] = 1
    assert all(random_matched.weights(base, labelled, generator(seed)).any() for seed in range(50))


def test_no_label_no_weight():
    nothing = torch.zeros(1, 4, 2, dtype=torch.bool)
    base = torch.ones(1, 4, 2)
    one = torch.ones(1, 4, dtype=torch.int64)
    assert shuffled.weights(base, nothing, one, generator()).sum() == 0
    assert random_matched.weights(base, nothing, generator()).sum() == 0
