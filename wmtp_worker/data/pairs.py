"""Pairs of a correct and an incorrect solution of one problem, from which a value model learns to tell them apart.

Both of a pair are about equally long: else the length alone would tell. How often a solution occurs is balanced, too.
"""

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from wmtp_worker.data.dataset import Dataset
from wmtp_worker.data.packing import Batch, collate
from wmtp_worker.data.sampler import PackedSampler
from wmtp_worker.data.tokenizer import Sample
from wmtp_worker.errors import InputError


@dataclass(frozen=True)
class Pair:
    """Two samples, by their place in the list that the pairs were made of."""

    correct: int
    incorrect: int


@dataclass(frozen=True)
class Bin:
    """Problems of difficulty `low` to `high`, both included, and their share among the pairs, relative to others."""

    low: int
    high: int
    weight: float = 1.0

    def __contains__(self, difficulty: int | None) -> bool:
        return difficulty is not None and self.low <= difficulty <= self.high


class PairRows:
    """Pairs as rows: n rows of correct solutions, then n rows of the incorrect ones, in the same order.

    So the k-th sample of row i and the k-th of row n + i are a pair. A row of pairs is packed by the longer solution of
    each, which `length_share` keeps about as long as the other.
    """

    def __init__(self, data: Dataset, pairs: Sequence[Pair], seed: int, packing: bool) -> None:
        """`pairs`: of `data.samples`. The order of an epoch is drawn from (seed, epoch)."""
        self._data = data
        self._pairs = pairs
        longest = [max(len(data.samples[pair.correct].ids), len(data.samples[pair.incorrect].ids)) for pair in pairs]
        self.sampler = PackedSampler(longest, data.sequence_length, seed, packing)

    def batch(self, rows: list[list[int]]) -> Batch:
        """A batch of twice as many rows; `rows` are places in the list of pairs."""
        samples = self._data.samples
        correct = [[samples[self._pairs[place].correct] for place in row] for row in rows]
        incorrect = [[samples[self._pairs[place].incorrect] for place in row] for row in rows]
        return collate(correct + incorrect, self._data.sequence_length, self._data.pad_id)

    def __len__(self) -> int:
        return len(self._pairs)


def make_pairs(
    samples: Sequence[Sample],
    *,
    per_problem: int,
    length_share: float,
    seed: int,
    difficulties: Sequence[int | None] = (),
    bins: Sequence[Bin] = (),
) -> list[Pair]:
    """At most `per_problem` pairs of each problem, none twice, in the order of the problems.

    The responses of a pair differ by at most `length_share` of the longer one's tokens. A solution that occurs several
    times is taken once. With `bins`, pairs are left out, by chance, until the bins have the shares that their weights
    say; `difficulties[n]` is that of problem n, and problems in no bin have no pairs. All of it follows from the
    arguments alone. Raises `InputError` where there is no pair at all, or none for a bin.
    """
    solutions = _solutions(samples)
    lengths = [len(sample.ids) - sample.prompt_length for sample in samples]
    pairs = {
        problem: list(_of_problem(correct, incorrect, lengths, per_problem, length_share, [seed, problem]))
        for problem, (correct, incorrect) in solutions.items()
    }
    if not any(pairs.values()):
        raise _no_pairs(solutions, length_share)
    if bins:
        pairs = _weighted(pairs, difficulties, bins, seed)
    return [pair for problem in sorted(pairs) for pair in pairs[problem]]


Solutions = dict[int, tuple[list[int], list[int]]]


def _solutions(samples: Sequence[Sample]) -> Solutions:
    """By problem: the correct and the incorrect samples, each text once."""
    solutions: Solutions = defaultdict(lambda: ([], []))
    seen: set[tuple[int, bytes]] = set()
    for number, sample in enumerate(samples):
        key = sample.problem, sample.ids.tobytes()
        if key not in seen and sample.reward in (0.0, 1.0):
            seen.add(key)
            solutions[sample.problem][0 if sample.reward else 1].append(number)
    return dict(sorted(solutions.items()))


def _of_problem(
    correct: list[int], incorrect: list[int], lengths: list[int], most: int, share: float, seed: list[int]
) -> Iterator[Pair]:
    """In rounds: each correct solution, in an order drawn by chance, gets one more incorrect one of its length."""
    random = np.random.default_rng(seed)
    by_length = sorted(incorrect, key=lambda number: (lengths[number], number))
    ordered = [lengths[number] for number in by_length]
    choices: dict[int, list[int]] = {}
    for number in random.permutation(correct).tolist():
        # for the longer one l, the shorter one s: l - s <= share * l
        shortest, longest = lengths[number] * (1 - share), lengths[number] / (1 - share) if share < 1 else np.inf
        window = by_length[bisect_left(ordered, shortest) : bisect_right(ordered, longest)]
        choices[number] = random.choice(window, min(most, len(window)), replace=False).tolist() if window else []
    used: dict[int, int] = defaultdict(int)
    while most and any(choices.values()):
        for number, left in choices.items():
            if left and most:
                rarest = min(left, key=lambda other: used[other])
                left.remove(rarest)
                used[rarest] += 1
                most -= 1
                yield Pair(number, rarest)


def _weighted(
    pairs: dict[int, list[Pair]], difficulties: Sequence[int | None], bins: Sequence[Bin], seed: int
) -> dict[int, list[Pair]]:
    """As many as there can be with these shares."""
    wanted = [one for one in bins if one.weight > 0]
    sorted_in = [
        [(problem, pair) for problem, some in pairs.items() if difficulties[problem] in one for pair in some]
        for one in wanted
    ]
    for one, found in zip(wanted, sorted_in, strict=True):
        if not found:
            raise InputError(
                f"no pair of a correct and an incorrect solution of difficulty {one.low} to {one.high}",
                where="data.pairs.difficulty_bins",
                fix="choose bins that the data has: wmtp data show counts problems by difficulty",
            )
    scale = min(len(found) / one.weight for one, found in zip(wanted, sorted_in, strict=True))
    kept: dict[int, list[Pair]] = defaultdict(list)
    for number, (one, found) in enumerate(zip(wanted, sorted_in, strict=True)):
        count = max(1, int(scale * one.weight + 1e-9))
        random = np.random.default_rng([seed, len(difficulties), number])
        for place in sorted(random.choice(len(found), count, replace=False).tolist()):
            problem, pair = found[place]
            kept[problem].append(pair)
    return kept


def _no_pairs(solutions: Solutions, share: float) -> InputError:
    both = sum(bool(correct and incorrect) for correct, incorrect in solutions.values())
    if both:
        return InputError(
            f"no pair of solutions is as equally long as data.pairs.length_share={share} asks for",
            where=f"{both} problems with correct and incorrect solutions",
            fix="raise data.pairs.length_share",
        )
    wrong = sum(len(incorrect) for _, incorrect in solutions.values())
    return InputError(
        f"no problem has both a correct and an incorrect solution ({wrong} incorrect ones in all)",
        where=f"{len(solutions)} problems",
        fix="let execution label solutions and make wrong ones: wmtp data label SRC DST --mutations 4",
    )
