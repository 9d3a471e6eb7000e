"""What values learn, in a stage of their own (`values`) or beside the policy (`critic`).

    pairwise        -log σ(V(correct) - V(incorrect)), V at the last token of each
    lambda_return   (V_t - G_t)², G the λ-return of the reward 1 or 0

The first is the Bradley-Terry model of preferences as reward models learn it, from the end of a solution (Ouyang et al.
2022, "InstructGPT", eq. 1). The second is TD(λ) with a forward view (`weighting.critic.lambda_returns`); no gradient
goes through its target. A state is what was written so far: after the prompt, and after each token of the solution.
"""

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F

from wmtp_worker.data.packing import IGNORE, Batch
from wmtp_worker.settings import Settings
from wmtp_worker.weighting.critic import lambda_returns
from wmtp_worker.weighting.statistics import Moments


def bradley_terry(correct: torch.Tensor, incorrect: torch.Tensor) -> torch.Tensor:
    """-log σ(correct - incorrect) of each pair: float32 [pairs] both, and out."""
    return F.softplus(incorrect - correct)


def ranked_right(correct: torch.Tensor, incorrect: torch.Tensor) -> torch.Tensor:
    """How many pairs' correct solution is judged higher, without gradient; equal ones count half."""
    return (((correct - incorrect).detach().sign() + 1) / 2).sum()


def states(batch: Batch) -> torch.Tensor:
    """bool [batch, time]: the tokens of a solution, and the last one of its prompt."""
    inside = batch.labels != IGNORE
    inside[:, :-1] |= inside[:, 1:] & (batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1])
    return inside


@dataclass(frozen=True)
class Objective:
    """`pairwise`, or λ-returns with γ and λ. `values`: float32 [batch, time], V after each token."""

    pairwise: bool
    gamma: float
    lam: float

    @classmethod
    def of(cls, settings: Settings) -> Self:
        form = settings.weighting.critic
        return cls(settings.value.objective == "pairwise", form.gamma, form.lam)

    def errors(self, values: torch.Tensor, batch: Batch, labels: str) -> torch.Tensor:
        """Squared errors of the states, from λ-returns: float32 [states].

        `labels`: the column with 1 or 0 at the last token of each solution.
        """
        targets = lambda_returns(values, batch.columns[labels], batch.segment_ids, self.gamma, self.lam)
        mask = states(batch)
        return (values[mask] - targets[mask]).square()

    def chance(self, values: torch.Tensor) -> torch.Tensor:
        """The probability of being correct that values stand for: σ(V) of ranked ones, V itself of returns."""
        return values.sigmoid() if self.pairwise else values.clamp(0, 1)

    def explained(self, values: torch.Tensor, batch: Batch, labels: str) -> tuple[Moments, Moments]:
        """Of all states: what the values miss of the discounted reward, and that itself: see `explained_variance`."""
        # ranked values know no discount
        gamma = 1.0 if self.pairwise else self.gamma
        returns = lambda_returns(values, batch.columns[labels], batch.segment_ids, gamma, 1.0)
        said, mask = values.sigmoid() if self.pairwise else values, states(batch)
        return Moments.of(returns - said, mask), Moments.of(returns, mask)
