"""Slow and plain versions of every family, written from the formulas alone: loops, math, no tensors inside."""

import itertools
import math
import random


def td_errors(values, rewards, gamma):
    """Of one sequence. The first token has none."""
    last = len(values) - 1
    return [0.0] + [
        rewards[j] + (gamma * values[j] if j < last else 0.0) - values[j - 1] for j in range(1, len(values))
    ]


def gae(errors, gamma, lam):
    """Of one sequence: the sum of eq. 16, term by term."""
    return [sum((gamma * lam) ** (j - i) * errors[j] for j in range(i, len(errors))) for i in range(len(errors))]


def lambda_returns(values, rewards, gamma, lam):
    """Of one sequence: the forward view, eq. 12.3, as a weighted sum of n-step returns; the end is after token `last`.

    The state after the last token has its reward.
    """
    last = len(values) - 1

    def n_steps(t, n):
        seen = sum(gamma ** (k - 1) * rewards[t + k] for k in range(1, n + 1))
        return seen + (gamma**n * values[t + n] if t + n < last else 0.0)

    out = []
    for t in range(last):
        steps = last - t
        weighted = sum((1 - lam) * lam ** (n - 1) * n_steps(t, n) for n in range(1, steps))
        out.append(weighted + lam ** (steps - 1) * n_steps(t, steps))
    return [*out, rewards[last]]


def softmax(scores):
    top = max(scores)
    powers = [math.exp(score - top) for score in scores]
    return [power / sum(powers) for power in powers]


def clip(value, low, high):
    return min(max(value, low), high)


def exp_clipped(advantage, beta, low, high):
    power = advantage / beta
    return high if power > 700 else clip(math.exp(power), low, high)


def top_share(excess, share):
    """Which of a head's labelled tokens are kept."""
    order = sorted(range(len(excess)), key=lambda i: (-excess[i], i))
    kept = set(order[: math.ceil(share * len(excess))])
    return [1.0 if i in kept else 0.0 for i in range(len(excess))]


def gradient_of_cross_entropy(logits, target):
    return [p - (1.0 if v == target else 0.0) for v, p in enumerate(softmax(logits))]


def norm(vector):
    return math.sqrt(sum(x * x for x in vector))


def group_advantages(rewards, groups, epsilon=1e-4):
    out = []
    for reward, group in zip(rewards, groups, strict=True):
        members = [r for r, g in zip(rewards, groups, strict=True) if g == group]
        mean = sum(members) / len(members)
        std = math.sqrt(sum((r - mean) ** 2 for r in members) / len(members))
        out.append((reward - mean) / (std + epsilon))
    return out


def mean1_clip(weights, low, high):
    """The scale by trying every interval between the points where an entry starts or stops to be clipped."""
    positive = sorted({bound / w for w in weights if w > 0 for bound in (low, high) if 0 < bound < math.inf})
    edges = [0.0, *positive, (positive[-1] if positive else 1.0) * 2 + len(weights) / max(sum(weights), 1e-300)]
    for left, right in itertools.pairwise(edges):
        middle = (left + right) / 2
        free = [w for w in weights if low < w * middle < high]
        fixed = sum(clip(w * middle, low, high) for w in weights if not low < w * middle < high)
        if free:
            scale = (len(weights) - fixed) / sum(free)
            if left <= scale * (1 + 1e-12) and scale <= right * (1 + 1e-12):
                return [clip(w * scale, low, high) for w in weights]
    return [clip(w * edges[-1], low, high) for w in weights]


def entropy(weights):
    total = sum(weights)
    shares = [w / total for w in weights]
    return -sum(p * math.log(p) for p in shares if p > 0) / math.log(len(weights))


def random_segments(rng: random.Random, time: int) -> list[int]:
    """Segment numbers of one row: a few sequences, then padding (0)."""
    row: list[int] = []
    number = 1
    while len(row) < time:
        length = min(rng.randint(1, 6), time - len(row))
        row += [number if rng.random() < 0.9 else 0] * length
        number += 1
    return row
