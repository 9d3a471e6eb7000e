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
    style: str  # how far up the scale each moment and head puts it, in percent: CSS variables
    title: str

    @property
    def shown(self) -> str:
        return self.text.replace("\n", "↵\n")


@dataclass(frozen=True)
class Sample:
    prompt: str
    tokens: list[Token]
    left_out: int
    heaviest: Table  # each head's weights
    curve: Chart | None


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
        _sample(described, [line["weights"][number] for line in chosen], chosen[-1]["step"], octaves)
        for number, described in enumerate(header["samples"])
    ]
    return Coloured(record.name, record.family, header["heads"], [line["step"] for line in chosen], samples)


def _sample(
    described: dict[str, Any], moments: Sequence[Sequence[Sequence[float]]], step: int, octaves: float
) -> Sample:
    texts, last = described["tokens"], moments[-1]
    tokens = [
        Token(text, _style([moment[at] for moment in moments], octaves), _title(step, last[at]))
        for at, text in enumerate(texts)
    ]
    order = sorted(range(len(texts)), key=lambda at: -sum(last[at]))[:_HEAVIEST]
    rows = [[json.dumps(texts[at], ensure_ascii=False), *map(spell, last[at])] for at in order]
    heads = [f"head {k}" for k in range(1, len(last[0]) + 1 if last else 1)]
    heaviest = Table(["token", *heads], rows, f"at step {step:,}")
    lines = [
        Line(head, range(1, len(texts) + 1), [weights[k] for weights in last], k + 1, "plain")
        for k, head in enumerate(heads)
    ]
    curve = chart("Weight along the solution", lines, f"step {step:,}, by head", "token", zero=True, level=1.0)
    return Sample(described["prompt"], tokens, described["left_out"], heaviest, curve)


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
    """Percent of the scale: 50 is a weight of 1, 0 one of 2^-octaves or less."""
    if not weight > 0:
        return 0
    return round(100 * min(max((math.log2(weight) / octaves + 1) / 2, 0.0), 1.0))
