"""What a report is made from: the record of a run, read into columns of numbers."""

import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic_core import from_json

Numbers = npt.NDArray[np.float64]
_TOGETHER = 4096
HISTOGRAM, RELIABILITY = "weight_histogram", "reliability"
Status = Literal["finished", "notice", "failed", "open"]


class Columns:
    """Records of one kind as columns, which take a tenth of the memory. A list's items are columns `name/0`, …"""

    def __init__(self) -> None:
        self._columns: dict[str, array[float]] = {}
        self._rows = 0
        # records with the same names, which become columns together: that is several times as fast
        self._names: tuple[str, ...] = ()
        self._waiting: list[tuple[Any, ...]] = []
        self.histograms: list[tuple[int, list[int]]] = []  # with their steps
        self.reliability: Any = None  # the last one: (foretold, correct in fact, how many) of each bin

    def __len__(self) -> int:
        return self._rows + len(self._waiting)

    def __contains__(self, name: str) -> bool:
        self._take_in()
        return name in self._columns

    def __getitem__(self, name: str) -> Numbers:
        """One number a record, NaN where it has none."""
        self._take_in()
        found = self._columns.get(name, array("d"))
        return np.concatenate([np.frombuffer(found, np.float64), np.full(self._rows - len(found), np.nan)])

    def each(self, name: str) -> list[Numbers]:
        """The columns of a list's items, in order."""
        return [self[f"{name}/{i}"] for i in range(sum(key.startswith(f"{name}/") for key in self.names()))]

    def names(self) -> list[str]:
        self._take_in()
        return list(self._columns)

    def add(self, record: dict[str, Any]) -> None:
        """Append a record, which is used up."""
        if (histogram := record.pop(HISTOGRAM, None)) is not None:
            self.histograms.append((record["step"], histogram))
        self.reliability = record.pop(RELIABILITY, self.reliability)
        names = tuple(record)
        if names != self._names or len(self._waiting) >= _TOGETHER:
            self._take_in()
            self._names = names
        self._waiting.append(tuple(record.values()))

    def _take_in(self) -> None:
        for name, values in zip(self._names, zip(*self._waiting, strict=True), strict=False):
            if set(map(type, values)) == {list}:
                for i, items in enumerate(zip(*values, strict=False)):  # as many as all of them have
                    self._extend(f"{name}/{i}", items)
            else:
                self._extend(name, values)
        self._rows += len(self._waiting)
        self._waiting = []

    def _extend(self, name: str, values: Sequence[Any]) -> None:
        types = set(map(type, values))
        if not types & {int, float}:
            return
        column = self._columns.setdefault(name, array("d"))
        column.extend([math.nan] * (self._rows - len(column)))
        column.extend(values if types <= {int, float} else map(_number, values))


def _number(value: Any) -> float:
    return value if isinstance(value, int | float) else math.nan


@dataclass(frozen=True)
class Save:
    """A checkpoint that was taken: seconds that the loop stood still, seconds until it was safe."""

    step: int
    pause: float
    carry: float | None


@dataclass(frozen=True)
class Record:
    """A run as its files tell it. Seconds are of the machine."""

    name: str
    metrics: Mapping[str, Columns] = field(default_factory=dict)  # by kind: train, validation
    weights: Sequence[Mapping[str, Any]] = ()  # the lines of weights.jsonl
    settings: Mapping[str, Any] = field(default_factory=dict)  # dotted key to value
    status: Status = "open"
    detail: str = ""  # of the end
    began: float | None = None  # seconds since the epoch
    running: float | None = None  # seconds, all processes together
    cost: float | None = None  # of all that time, in the unit of host.price_per_hour, as far as prices are known
    unpriced: int = 0  # processes that the cost leaves out
    saves: Sequence[Save] = ()
    losses: Mapping[str, Any] = field(default_factory=dict)  # `checkpoint.losses.Losses.to_json`
    losses_sentence: str = ""
    value: "Record | None" = None  # the run that trained its value model

    def of(self, kind: str) -> Columns:
        return self.metrics.get(kind) or Columns()

    @property
    def step(self) -> int:
        """The last one that is on record."""
        last = [columns["step"][-1] for columns in self.metrics.values() if len(columns)]
        return int(max(last, default=0))

    @property
    def family(self) -> str:
        """What weighs its tokens, in words."""
        family = str(self.settings.get("weighting.family", self.weights[0]["family"] if self.weights else ""))
        control = str(self.settings.get("weighting.control", "none"))
        return family if control == "none" else f"{family}, {control.replace('_', ' ')}"


def read_metrics(path: Path) -> dict[str, Columns]:
    """`metrics.jsonl` by kind of record, in order; lines that cannot be understood are left out."""
    kinds: dict[str, Columns] = {}
    for record in _lines(path):
        if isinstance(record.get("step"), int) and isinstance(kind := record.get("kind"), str):
            kinds.setdefault(kind, Columns()).add(record)
    return kinds


def read_weights(path: Path) -> list[dict[str, Any]]:
    """The header of `weights.jsonl` and its records; empty where there are none."""
    lines = list(_lines(path))
    return lines if len(lines) > 1 and "samples" in lines[0] else []


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        file = path.open("rb")
    except OSError:
        return
    with file:
        for line in file:
            try:
                record = from_json(line)  # three times as fast as json
            except (ValueError, RecursionError):  # torn by a crash, or somebody else's
                continue
            if isinstance(record, dict):
                yield record
