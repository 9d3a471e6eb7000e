"""Charts as paths in a square of 1000 by 1000 units: the page stretches them, and sets all text beside them as HTML."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from wmtp_worker.tracking.report.record import Numbers

UNITS = 1000
COLOURS = 8
BUCKETS = 250  # points of a line: more than a screen shows apart
_TABLE_ROWS = 9
Style = Literal["line", "plain", "dots", "band", "bars", "dashed", "faint"]


@dataclass(frozen=True)
class Line:
    """One quantity: `x` and `y` alike in length; `colour` counts from 1. NaN and infinities are left out."""

    name: str
    x: npt.ArrayLike
    y: npt.ArrayLike
    colour: int = 1
    style: Style = "line"  # band: the mean, within the range of what it is the mean of; plain: its end says nothing


@dataclass(frozen=True)
class Drawn:
    name: str
    colour: int
    style: Style
    path: str
    band: str  # the path of an area
    joined: str  # the path through dots
    last: str  # its last value, in words, where that says something


@dataclass(frozen=True)
class Table:
    """Cells as text; the first of a row names it."""

    header: list[str]
    rows: list[list[str]]
    caption: str = ""
    words: bool = False  # else all but the first are numbers


@dataclass(frozen=True)
class Tick:
    percent: float
    text: str


@dataclass(frozen=True)
class Chart:
    title: str
    caption: str
    x_name: str
    lines: list[Drawn]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    domain: tuple[float, float, float, float]  # x0, x1, y0, y1
    table: Table
    level: float | None = None  # percent, of a line to compare with
    share: bool = False  # whether values are shares, to be said in percent
    dashed: bool = False  # whether all lines but the first are: equal ones would hide each other

    @property
    def description(self) -> str:
        """The chart in words."""
        caption = f" ({self.caption})" if self.caption else ""
        return f"{self.title}{caption}. " + "; ".join(
            f"{line.name} ends at {line.last}" for line in self.lines if line.last
        )


def chart(
    title: str,
    lines: Sequence[Line],
    caption: str = "",
    x_name: str = "step",
    *,
    zero: bool = False,
    top: float | None = None,
    number: Callable[[float], str] | None = None,
    x_number: Callable[[float], str] | None = None,
    level: float | None = None,
    share: bool = False,
    dashed: bool = False,
) -> Chart | None:
    """The chart of these lines, None where none has a point.

    `zero`: the axis begins at 0; `top`: and ends there, if nothing is above. `number`, `x_number`: how values are
    said. `level`: a value to compare with. `share`: y are parts of 1, which are said in percent. `dashed`: lines that
    may be equal, as those of heads, are told apart.
    """
    say, say_x = number or (percent if share else spell), x_number or spell
    reduced = [(line, *_reduce(line)) for line in lines]
    reduced = [item for item in reduced if len(item[1])]
    if not reduced:
        return None
    xs = np.concatenate([x for _, x, _, _, _ in reduced])
    x0, x1 = _wide(float(xs.min()), float(xs.max()))
    y0, y1 = _range([(y, low, high) for _, _, y, low, high in reduced], zero or reduced[0][0].style == "bars", top)
    y0, y1 = _told_apart(y0, y1, say)

    def place(x: Numbers, y: Numbers) -> str:
        across = np.rint((x - x0) / (x1 - x0) * UNITS).astype(int)
        down = np.rint(UNITS - (y - y0) / (y1 - y0) * UNITS).astype(int).clip(0, UNITS)
        return "L".join(f"{a} {b}" for a, b in zip(across.tolist(), down.tolist(), strict=True))

    drawn = []
    for line, x, y, low, high in reduced:
        band = ""
        if line.style == "band" and len(x) > 1:
            band = f"M{place(np.concatenate([x, x[::-1]]), np.concatenate([high, low[::-1]]))}Z"
        joined = f"M{place(x, y)}" if line.style == "dots" and len(x) > 1 else ""
        colour = (line.colour - 1) % COLOURS + 1
        last = "" if line.style in ("plain", "bars", "dashed") else say(float(y[-1]))
        drawn.append(Drawn(line.name, colour, line.style, _path(line.style, x, y, place), band, joined, last))
    x_ticks = [Tick(_percent(at, x0, x1), say_x(at)) for at in ticks(x0, x1)]
    y_ticks = [Tick(_percent(at, y0, y1), say(at)) for at in ticks(y0, y1)]
    table = _table([(line, x, y) for line, x, y, _, _ in reduced], x_name, say, say_x)
    at = None if level is None or not y0 <= level <= y1 else _percent(level, y0, y1)
    return Chart(title, caption, x_name, drawn, x_ticks, y_ticks, (x0, x1, y0, y1), table, at, share, dashed)


def _path(style: Style, x: Numbers, y: Numbers, place: Callable[[Numbers, Numbers], str]) -> str:
    if style == "dots":
        return "".join(f"M{point}h0" for point in place(x, y).split("L"))
    if style == "bars":  # y[i] from x[i] to x[i + 1]; the last y stands for nothing
        along, up = np.repeat(x, 2), np.concatenate([[0.0], np.repeat(y[:-1], 2), [0.0]])
        return f"M{place(along, up)}"
    return f"M{place(x, y)}"


def _reduce(line: Line) -> tuple[Numbers, Numbers, Numbers, Numbers]:
    """At most `BUCKETS` points: means of x and y, and the least and largest y of each bucket."""
    x, y = np.asarray(line.x, np.float64), np.asarray(line.y, np.float64)
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    if len(x) <= BUCKETS:
        return x, y, y, y
    starts = np.linspace(0, len(x), BUCKETS, endpoint=False).astype(int)
    counts = np.diff(np.append(starts, len(x)))
    means = [np.add.reduceat(values, starts) / counts for values in (x, y)]
    # the curve begins and ends where the record does
    means[0][[0, -1]] = x[[0, -1]]
    return means[0], means[1], np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)


def _range(series: Sequence[tuple[Numbers, Numbers, Numbers]], zero: bool, top: float | None) -> tuple[float, float]:
    lowest, highest = math.inf, -math.inf
    for y, low, high in series:
        # a single spike must not flatten all the rest: bands may leave the picture, means may not
        lowest = min(lowest, float(y.min()), float(np.quantile(low, 0.02)))
        highest = max(highest, float(y.max()), float(np.quantile(high, 0.98)))
    if zero:
        lowest = min(0.0, lowest)
    lowest, highest = _wide(lowest, highest if top is None else max(top, highest))
    margin = 0.04 * (highest - lowest)
    return (lowest if lowest == 0 else lowest - margin), (highest if highest == top else highest + margin)


def _wide(low: float, high: float) -> tuple[float, float]:
    """The same, or a little more where there is nothing between."""
    return (low, high) if high > low else (low - (abs(low) * 0.05 or 1), high + (abs(high) * 0.05 or 1))


def _told_apart(low: float, high: float, say: Callable[[float], str]) -> tuple[float, float]:
    """The same, or more where the labels of two ticks would be one."""
    for _ in range(64):
        labels = [say(at) for at in ticks(low, high)]
        if len(set(labels)) == len(labels):
            break
        margin = (high - low) / 2
        low, high = (low if low == 0 else low - margin), high + margin
    return low, high


def _percent(value: float, low: float, high: float) -> float:
    return round(100 * (value - low) / (high - low), 2)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from `low` to `high`: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def spell(value: float) -> str:
    """A number as a person would write it: 12,000, 3.142, 0.0012, 2e-05."""
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 1000 or value == int(value):
        return f"{value:,.0f}" if size < 1e9 else f"{value:.3g}"
    return f"{value:.4g}" if size >= 1e-4 else f"{value:.2g}"


def percent(share: float) -> str:
    """A part of 1 in percent."""
    value = 100 * share
    return f"{value:.3g}%" if value == 0 or abs(value) >= 0.1 else f"{value:.1g}%"


def _table(
    series: Sequence[tuple[Line, Numbers, Numbers]],
    x_name: str,
    say: Callable[[float], str],
    say_x: Callable[[float], str],
) -> Table:
    """Some of the numbers, for those who do not see the picture."""
    longest = max((x for _, x, _ in series), key=len)
    if series[0][0].style == "bars":
        longest = longest[:-1]
    chosen = longest[np.unique(np.linspace(0, len(longest) - 1, _TABLE_ROWS).astype(int))]
    rows = []
    for at in chosen.tolist():
        cells = [say(float(y[np.abs(x - at).argmin()])) if x[0] <= at <= x[-1] else "" for _, x, y in series]
        rows.append([say_x(at), *cells])
    return Table([x_name, *(line.name for line, _, _ in series)], rows)
