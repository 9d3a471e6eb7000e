"""How good a judge of solutions is: a value model, or a reward model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from wmtp_worker.data.pairs import Pair
from wmtp_worker.weighting.statistics import Moments

BINS = 10


@dataclass(frozen=True)
class Quality:
    """`pairwise_accuracy`: share of pairs whose correct solution is judged higher; equal ones count half.

    `explained_variance`: 1 - Var[y - p] / Var[y], of being correct y by the judged probability p at a solution's end: 1
    is perfect, 0 as good as the mean, negative is worse. `calibration`: see `calibration_error`.
    """

    pairwise_accuracy: float
    explained_variance: float
    calibration: float

    def __str__(self) -> str:
        return (
            f"pairwise accuracy {self.pairwise_accuracy:.1%}  explained variance {self.explained_variance:.3f}  "
            f"calibration error {self.calibration:.3f}"
        )


def quality(judged: torch.Tensor, chance: torch.Tensor, correct: torch.Tensor, pairs: Sequence[Pair]) -> Quality:
    """Of what a judge said at the last token of each solution.

    `judged`: what is compared in a pair; `chance`: the probability of being correct that it stands for; `correct`: 1 or
    0; all [solutions]. `pairs` (not empty) name places in them.
    """
    judged, chance, correct = judged.double(), chance.double(), correct.double()
    better = judged[[pair.correct for pair in pairs]] - judged[[pair.incorrect for pair in pairs]]
    return Quality(
        pairwise_accuracy=float(((better.sign() + 1) / 2).mean()),
        explained_variance=explained_variance(_moments(correct - chance), _moments(correct)),
        calibration=calibration_error(chance, correct),
    )


def _moments(values: torch.Tensor) -> Moments:
    return Moments.of(values, torch.ones_like(values, dtype=torch.bool))


def explained_variance(errors: Moments, targets: Moments) -> float:
    """1 - Var[errors] / Var[targets]; 0 where the targets do not vary."""
    return 1 - (errors.std / targets.std) ** 2 if targets.std else 0.0


def calibration_error(chance: torch.Tensor, correct: torch.Tensor) -> float:
    """Expected calibration error: Σ_m |B_m| / n · |mean correctness of B_m - mean probability of B_m|.

    B_m are the solutions whose `chance` lies in the m-th of ten equally wide bins of 0 … 1 (Guo et al., "On Calibration
    of Modern Neural Networks", 2017, eq. 3, of the probability of being correct). `chance`, `correct`: [solutions].
    """
    places = _places(chance)
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add(0, places.cpu(), (correct - chance).double().cpu())
    return float(gaps.abs().sum()) / len(chance)


def reliability(chance: torch.Tensor, correct: torch.Tensor) -> list[list[float]]:
    """What a reliability diagram shows: mean probability, mean correctness and size of each bin that is not empty.

    Bins and arguments are those of `calibration_error`.
    """
    places = _places(chance)
    bins = [places == place for place in range(BINS)]
    return [[float(chance[one].mean()), float(correct[one].mean()), int(one.sum())] for one in bins if one.any()]


def _places(chance: torch.Tensor) -> torch.Tensor:
    return (chance * BINS).long().clamp(0, BINS - 1)
