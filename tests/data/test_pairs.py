"""Pairs of right and wrong: equally long, different, few of each problem, and always the same."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wmtp_worker.data.pairs import Bin, Pair, make_pairs
from wmtp_worker.data.tokenizer import Sample
from wmtp_worker.errors import InputError

PROMPT = 3


def sample(problem: int, reward: float, length: int, variant: int = 0) -> Sample:
    return Sample(np.full(PROMPT + length, 1000 * variant + length, dtype=np.int32), PROMPT, problem, reward)


def pairs(samples, per_problem=4, length_share=0.2, seed=1, **options):
    return make_pairs(samples, per_problem=per_problem, length_share=length_share, seed=seed, **options)


labelled = st.lists(
    st.builds(
        sample, st.integers(0, 3), st.sampled_from([0.0, 1.0, float("nan")]), st.integers(1, 30), st.integers(0, 3)
    ),
    min_size=1,
    max_size=60,
)


@given(labelled, st.integers(1, 6), st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_whatever_the_samples(samples, per_problem, share, seed):
    allowed = {
        (a.problem, a.ids.tobytes(), b.ids.tobytes())
        for a in samples
        for b in samples
        if a.problem == b.problem and a.reward == 1 and b.reward == 0
        if abs(len(a.ids) - len(b.ids)) <= share * (max(len(a.ids), len(b.ids)) - PROMPT) + 1e-9
    }
    # a text that is called right and wrong counts as what it was called first
    first = {}
    for one in samples:
        if one.reward in (0.0, 1.0):
            first.setdefault((one.problem, one.ids.tobytes()), one.reward)
    allowed = {key for key in allowed if first[key[:2]] == 1 and first[(key[0], key[2])] == 0}
    if not allowed:
        with pytest.raises(InputError):
            pairs(samples, per_problem, share, seed)
        return
    made = pairs(samples, per_problem, share, seed)
    keys = [
        (samples[p.correct].problem, samples[p.correct].ids.tobytes(), samples[p.incorrect].ids.tobytes()) for p in made
    ]
    assert len(set(keys)) == len(keys)
    assert set(keys) <= allowed
    there = Counter(key[0] for key in allowed)
    assert Counter(key[0] for key in keys) == {problem: min(per_problem, count) for problem, count in there.items()}
    assert made == pairs(samples, per_problem, share, seed)
    assert [key[0] for key in keys] == sorted(key[0] for key in keys)


def test_every_solution_gets_its_turn():
    samples = [sample(0, 1, 10, n) for n in range(4)] + [sample(0, 0, 10, 10 + n) for n in range(4)]
    made = pairs(samples, per_problem=8)
    assert set(Counter(pair.correct for pair in made).values()) == {2}
    assert set(Counter(pair.incorrect for pair in made).values()) <= {1, 2, 3}


def test_the_seed_decides_which():
    samples = [sample(0, 1, 10, n) for n in range(20)] + [sample(0, 0, 10, 100 + n) for n in range(20)]
    assert pairs(samples, seed=1) != pairs(samples, seed=2)


def test_by_hand():
    samples = [sample(0, 1, 10), sample(0, 0, 12), sample(0, 0, 13), sample(1, 1, 5), sample(1, 0, 9)]
    assert pairs(samples, length_share=0.2) == [Pair(0, 1)]
    assert set(pairs(samples, length_share=0.5)) == {Pair(0, 1), Pair(0, 2), Pair(3, 4)}


def by_difficulty(counts):
    """`counts[d]` problems of difficulty d, each with one pair."""
    difficulties = [difficulty for difficulty, count in counts.items() for _ in range(count)]
    samples = [one for problem in range(len(difficulties)) for one in (sample(problem, 1, 9), sample(problem, 0, 10))]
    return samples, difficulties


def test_bins_have_the_shares_of_their_weights():
    samples, difficulties = by_difficulty({1: 40, 3: 40, 7: 30, None: 50, 20: 9})
    bins = [Bin(1, 3, 0.5), Bin(7, 10, 0.5), Bin(20, 28, 0)]
    made = pairs(samples, difficulties=difficulties, bins=bins)
    assert Counter(difficulties[samples[pair.correct].problem] in (1, 3) for pair in made) == {True: 30, False: 30}
    assert {difficulties[samples[pair.correct].problem] for pair in made} == {1, 3, 7}
    assert made == pairs(samples, difficulties=difficulties, bins=bins)


def test_a_bin_without_pairs_is_named():
    samples, difficulties = by_difficulty({1: 4})
    with pytest.raises(InputError, match="difficulty 8 to 9") as caught:
        pairs(samples, difficulties=difficulties, bins=[Bin(1, 2), Bin(8, 9)])
    assert "wmtp data show" in caught.value.fix


@pytest.mark.parametrize(
    ("samples", "words", "fix"),
    [
        ([sample(0, 1, 9)], r"\(0 incorrect ones in all\)", "--mutations"),
        ([sample(0, 1, 9), sample(1, 0, 9)], r"\(1 incorrect ones in all\)", "--mutations"),
        ([sample(0, 1, 9), sample(0, 0, 19)], "as equally long", "data.pairs.length_share"),
    ],
)
def test_no_pair_at_all_is_an_error_with_its_reason(samples, words, fix):
    with pytest.raises(InputError, match=words) as caught:
        pairs(samples)
    assert fix in caught.value.fix
