"""Means and deviations over labelled tokens: of a batch, or as an exponential moving average over batches."""

from dataclasses import dataclass, replace
from typing import Self

import torch


@dataclass(frozen=True)
class Moments:
    """Count, sum and sum of squares: they add up over micro-batches and ranks."""

    count: float = 0.0
    total: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, values: torch.Tensor, mask: torch.Tensor) -> Self:
        """Those of `values` (any shape and float dtype) where `mask` (bool, same shape) is set; summed in fp64."""
        chosen = values[mask].to("cpu", torch.float64)
        return cls(chosen.numel(), float(chosen.sum()), float(chosen.square().sum()))

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.count + other.count, self.total + other.total, self.squares + other.squares)

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0

    @property
    def std(self) -> float:
        """Of the population, divided by the count; 0 where there is nothing."""
        return max(self.squares / self.count - self.mean**2, 0.0) ** 0.5 if self.count else 0.0


@dataclass(frozen=True)
class MovingAverage:
    """Mean and second moment over batches, `m ← d·m + (1 - d)·batch`, without the bias of its start.

    The bias is corrected as in Adam (Kingma & Ba 2015, algorithm 1): divided by 1 - d^batches. Immutable and made of
    plain numbers: a checkpoint holds it exactly.
    """

    decay: float
    mean_sum: float = 0.0
    square_sum: float = 0.0
    batches: int = 0

    def updated(self, batch: Moments) -> "MovingAverage":
        """After one more batch; one without a single value changes nothing."""
        if not batch.count:
            return self
        d = self.decay
        return replace(
            self,
            mean_sum=d * self.mean_sum + (1 - d) * batch.mean,
            square_sum=d * self.square_sum + (1 - d) * batch.squares / batch.count,
            batches=self.batches + 1,
        )

    @property
    def mean(self) -> float:
        return self.mean_sum / self._weight if self.batches else 0.0

    @property
    def std(self) -> float:
        """0 before the first batch."""
        return max(self.square_sum / self._weight - self.mean**2, 0.0) ** 0.5 if self.batches else 0.0

    @property
    def _weight(self) -> float:
        return 1 - self.decay**self.batches


def whiten(values: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    """`(values - mean) / std` as float32; values that are all equal (std 0) become 0."""
    if std <= 1e-8 * max(1.0, abs(mean)):
        return torch.zeros_like(values, dtype=torch.float32)
    return (values.float() - mean) / std
