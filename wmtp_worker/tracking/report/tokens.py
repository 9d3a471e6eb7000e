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
OCTAVES = 3  # weights from 1/8 to 8 have colours of their own
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


def coloured(record: Record) -> Coloured | None:
    """The samples of a run; None where nothing was weighed."""
    if not record.weights:
        return None
    header, *lines = record.weights
    chosen = [lines[i] for i in np.unique(np.linspace(0, len(lines) - 1, MOMENTS).astype(int))]
    samples = [
        _sample(described, [line["weights"][number] for line in chosen], chosen[-1]["step"])
        for number, described in enumerate(header["samples"])
    ]
    return Coloured(record.name, record.family, header["heads"], [line["step"] for line in chosen], samples)


def _sample(described: dict[str, Any], moments: Sequence[Sequence[Sequence[float]]], step: int) -> Sample:
    texts, last = described["tokens"], moments[-1]
    tokens = [
        Token(text, _style([moment[at] for moment in moments]), _title(step, last[at])) for at, text in enumerate(texts)
    ]
    order = sorted(range(len(texts)), key=lambda at: -sum(last[at]))[:_HEAVIEST]
    rows = [[json.dumps(texts[at], ensure_ascii=False), *map(spell, last[at])] for at in order]
    heads = [f"head {k}" for k in range(1, len(last[0]) + 1 if last else 1)]
    heaviest = Table(["token", *heads], rows, f"at step {step:,}")
    lines = [
        Line(head, range(1, len(texts) + 1), [weights[k] for weights in last], k + 1) for k, head in enumerate(heads)
    ]
    curve = chart("Weight along the solution", lines, f"step {step:,}, by head", "token", zero=True, level=1.0)
    return Sample(described["prompt"], tokens, described["left_out"], heaviest, curve)


def _style(moments: Sequence[Sequence[float]]) -> str:
    return ";".join(
        f"--m{moment}h{head}:{level(weight)}"
        for moment, weights in enumerate(moments)
        for head, weight in enumerate(weights, start=1)
    )


def _title(step: int, weights: Sequence[float]) -> str:
    return f"step {step:,}: " + ", ".join(
        f"head {head} {spell(weight)}" for head, weight in enumerate(weights, start=1)
    )


def level(weight: float) -> int:
    """Percent of the scale, in octaves: 50 is a weight of 1."""
    if not weight > 0:
        return 0
    return round(100 * min(max((math.log2(weight) + OCTAVES) / (2 * OCTAVES), 0.0), 1.0))
