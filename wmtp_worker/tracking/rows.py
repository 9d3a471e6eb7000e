"""What a line of a run's record is on a tracking server: one row a number."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One number of one step. The same line gives the same row, timestamp and all, however often it is sent."""

    key: str
    value: float
    timestamp: int  # Unix milliseconds
    step: int


_PREFIX = {"train": "", "system": "system/"}
# of lines without a time of their own: after 2001, which servers show as a date
_EPOCH = 1_000_000_000.0


def rows_of(line: Mapping[str, Any]) -> list[Row]:
    """The numbers of a line. Those of training keep their names, others have the line's kind before it:
    `loss`, `head_loss_1`, `validation_loss`, `value_loss`, `system/cpu_utilization_percentage`.

    Words, truth values and what is no line of a record give nothing.
    """
    kind, step = line.get("kind"), line.get("step")
    if not isinstance(kind, str) or not isinstance(step, int):
        return []
    time = line.get("time")
    seconds = time if isinstance(time, int | float) and math.isfinite(time) else _EPOCH + step
    prefix = _PREFIX.get(kind, f"{kind}_")
    values = {name: value for name, value in line.items() if name not in ("kind", "step", "time")}
    return [Row(prefix + name, value, round(seconds * 1000), step) for name, value in _numbers(values)]


def _numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, bool):
            continue
        if isinstance(value, int | float):
            yield name, float(value)
        elif isinstance(value, list):
            yield from _numbers({f"{name}_{number}": item for number, item in enumerate(value, start=1)})
        elif isinstance(value, dict):
            yield from _numbers({f"{name}_{inner}": item for inner, item in value.items()})
