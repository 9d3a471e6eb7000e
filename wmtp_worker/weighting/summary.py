"""What a step's weights look like, as numbers for the log."""

import math
from dataclasses import dataclass
from typing import Self

import torch

from wmtp_worker.weighting.bins import EDGES
from wmtp_worker.weighting.statistics import Moments


@dataclass(frozen=True)
class Summary:
    """Sums over labelled weights, from which all numbers follow: they add up over micro-batches and ranks.

    `squares`: of the distances from the mean; `logs`: Σ w ln w.
    """

    count: int = 0
    total: float = 0.0
    squares: float = 0.0
    logs: float = 0.0
    smallest: float = math.inf
    largest: float = -math.inf

    @classmethod
    def of(cls, weights: torch.Tensor, labelled: torch.Tensor) -> Self:
        """Of `weights` (float32 [batch, time, heads], not negative) where `labelled` (bool, same shape) is set."""
        chosen = weights[labelled].to("cpu", torch.float64)
        if not len(chosen):
            return cls()
        return cls(
            count=len(chosen),
            total=float(chosen.sum()),
            squares=float((chosen - chosen.mean()).square().sum()),
            logs=-float(torch.special.entr(chosen).sum()),
            smallest=float(chosen.min()),
            largest=float(chosen.max()),
        )

    def __add__(self, other: "Summary") -> "Summary":
        if not (self.count and other.count):
            return self if self.count else other
        # Chan, Golub & LeVeque, "Algorithms for computing the sample variance" (1983), eq. 1.5b
        apart = self.total / self.count - other.total / other.count
        between = apart**2 * self.count * other.count / (self.count + other.count)
        return Summary(
            self.count + other.count,
            self.total + other.total,
            self.squares + other.squares + between,
            self.logs + other.logs,
            min(self.smallest, other.smallest),
            max(self.largest, other.largest),
        )

    def facts(self) -> dict[str, float]:
        """`weight_mean`, `_std`, `_min`, `_max` and `_entropy`; empty where nothing is labelled.

        Entropy: of the shares p = w / Σw, divided by its largest value ln N, so 1 is uniform and 0 all weight on one of
        the N entries (1 for N = 1).
        """
        if not self.count:
            return {}
        # -Σ p ln p = ln Σw - Σ w ln w / Σw
        entropy = math.log(self.total) - self.logs / self.total
        most = math.log(self.count)
        return {
            "weight_mean": self.total / self.count,
            "weight_std": math.sqrt(self.squares / self.count),
            "weight_min": self.smallest,
            "weight_max": self.largest,
            "weight_entropy": min(max(entropy / most, 0.0), 1.0) if most else 1.0,
        }


def clipped(weights: torch.Tensor, labelled: torch.Tensor, low: float, high: float) -> Moments:
    """Which of the labelled weights stand on one of their bounds, as ones and zeros: the mean is their share."""
    at_bound = (weights <= low * (1 + 1e-6)) | (weights >= high * (1 - 1e-6))
    return Moments.of(at_bound, labelled)


def histogram(weights: torch.Tensor, labelled: torch.Tensor) -> list[int]:
    """How many of the labelled weights are 0, up to each of `bins.EDGES`, and above the last: len(EDGES) + 2 counts.

    `weights`: float32, any shape; `labelled`: bool, same shape.
    """
    chosen = weights[labelled].to("cpu", torch.float64)
    above_zero = chosen[chosen > 0]
    bins = torch.bucketize(above_zero, torch.tensor(EDGES, dtype=torch.float64))
    counts: list[int] = torch.bincount(bins, minlength=len(EDGES) + 1).tolist()
    return [len(chosen) - len(above_zero), *counts]
