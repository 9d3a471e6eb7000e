"""The probe's samples: the code's own tokens, coloured by how much each head's loss of them weighs."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from wmtp_worker.tracking.report.chart import Chart, Line, Table, chart, spell
from wmtp_worker.tracking.report.record import Record

MOMENTS = 4  # steps that are shown
_OCTAVES = (0.5, 1.0, 2.0, 3.0)  # either way of 1: how far the colours reach
_TOLD_APART = 0.95  # of the weights
_HEAVIEST = 8


@dataclass(frozen=True)
class Token:
    text: str
    style: str  # how far each moment and head puts it from the middle of the scale, in percent: CSS variables
    title: str

    @property
    def shown(self) -> str:
        return self.text.replace("\n", "↵\n")


@dataclass(frozen=True)
class Sample:
    prompt: str
    tokens: list[Token]
    left_out: int
    heaviest: list[Table]  # each head's weights, at each moment
    curves: list[Chart | None]


@dataclass(frozen=True)
class Coloured:
    """One run's samples."""

    run: str
    family: str
    heads: int
    steps: list[int]
    samples: list[Sample]


def reach(records: Sequence[Record]) -> float:
    """Octaves either way of 1 that the colours must reach for these runs, the same for all."""
    lines = [line for record in records for line in record.weights[1:]]
    sizes = np.array([weight for line in lines for sample in line["weights"] for token in sample for weight in token])
    octaves = np.abs(np.log2(sizes[sizes > 0]))
    needed = float(np.quantile(octaves, _TOLD_APART)) if len(octaves) else 0.0
    return next((octave for octave in _OCTAVES if octave >= needed), _OCTAVES[-1])


def scale(octaves: float) -> list[str]:
    """What stands under the scale of colours, from left to right."""
    return [spell(float(f"{2.0**at:.2g}")) for at in np.linspace(-octaves, octaves, 5)]


def coloured(record: Record, octaves: float) -> Coloured | None:
    """The samples of a run, with colours from 2^-octaves to 2^octaves; None where nothing was weighed."""
    if not record.weights:
        return None
    header, *lines = record.weights
    chosen = [lines[i] for i in np.unique(np.rint(np.linspace(0, len(lines) - 1, MOMENTS)).astype(int))]
    samples = [
        _sample(described, [line["weights"][number] for line in chosen], [line["step"] for line in chosen], octaves)
        for number, described in enumerate(header["samples"])
    ]
    return Coloured(record.name, record.family, header["heads"], [line["step"] for line in chosen], samples)


def _sample(
    described: dict[str, Any], moments: Sequence[Sequence[Sequence[float]]], steps: Sequence[int], octaves: float
) -> Sample:
    texts = described["tokens"]
    tokens = []
    for at, text in enumerate(texts):
        weights = [moment[at] for moment in moments]
        tokens.append(Token(text, _style(weights, octaves), "\n".join(map(_title, steps, weights))))
    # one scale, or the moments could not be compared
    top = max((weight for moment in moments for token in moment for weight in token), default=1.0)
    return Sample(
        described["prompt"],
        tokens,
        described["left_out"],
        [_heaviest(texts, moment, step) for moment, step in zip(moments, steps, strict=True)],
        [_curve(moment, step, top) for moment, step in zip(moments, steps, strict=True)],
    )


def _heads(weights: Sequence[Sequence[float]]) -> list[str]:
    return [f"head {k}" for k in range(1, len(weights[0]) + 1 if weights else 1)]


def _heaviest(texts: Sequence[str], weights: Sequence[Sequence[float]], step: int) -> Table:
    order = sorted(range(len(texts)), key=lambda at: -sum(weights[at]))[:_HEAVIEST]
    rows = [[json.dumps(texts[at], ensure_ascii=False), *map(spell, weights[at])] for at in order]
    return Table(["token", *_heads(weights)], rows, f"at step {step:,}")


def _curve(weights: Sequence[Sequence[float]], step: int, top: float) -> Chart | None:
    lines = [
        Line(head, range(1, len(weights) + 1), [token[k] for token in weights], k + 1, "plain")
        for k, head in enumerate(_heads(weights))
    ]
    caption = f"step {step:,}, by head"
    return chart(
        "Weight along the solution", lines, caption, "token", zero=True, top=max(top, 1.0), level=1.0, dashed=True
    )


def _style(moments: Sequence[Sequence[float]], octaves: float) -> str:
    return ";".join(
        f"--m{moment}h{head}:{level(weight, octaves)}"
        for moment, weights in enumerate(moments)
        for head, weight in enumerate(weights, start=1)
    )


def _title(step: int, weights: Sequence[float]) -> str:
    return f"step {step:,}: " + ", ".join(
        f"head {head} {spell(weight)}" for head, weight in enumerate(weights, start=1)
    )


def level(weight: float, octaves: float) -> int:
    """Percent of the way from a weight of 1, which is 0, to 2^octaves, 100, or to 2^-octaves, -100, or beyond."""
    if not weight > 0:
        return -100
    return round(100 * min(max(math.log2(weight) / octaves, -1.0), 1.0))
