"""The picture of fleet.json: what each save policy wastes. Also by itself: python benchmarks/fleet_picture.py"""

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

# Okabe and Ito's colours, told apart with any kind of colour vision; markers and dashes say the same again
STYLES = (
    {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    {"color": "#E69F00", "marker": "D", "linestyle": "--"},
    {"color": "#999999", "marker": "^", "linestyle": "-"},
    {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    {"color": "#CC79A7", "marker": "v", "linestyle": ":"},
    {"color": "#009E73", "marker": "P", "linestyle": "-"},
)
# Paul Tol's, so that nobody takes them for the policies'
PARTS = {
    "lost": ("#882255", "", "work done again"),
    "paused": ("#DDCC77", "xx", "pauses of saves"),
    "slowed": ("#999933", "..", "slower steps beside saves"),
    "restarted": ("#88CCEE", "//", "restarts and shutdowns"),
}
USUAL = "Poisson 2 a day"


def draw(document: dict[str, Any], picture: Path) -> None:
    """Draw the result of `fleet.py` into a PNG."""
    names = list(document["policies"][USUAL])
    styles = dict(zip(names, STYLES, strict=True))
    figure = Figure(figsize=(14, 10.5), layout="constrained")
    axes = figure.subplots(2, 2)
    facts = document["simulated"]
    title = f"{facts['days']:g} days of a 7B model on {facts['gpus']} GPUs: GPU time wasted, by how it saves"
    figure.suptitle(f"{title}\n\n", fontsize=15, fontweight="bold")
    figure.text(
        0.5,
        0.955,
        f"{facts['state'] / 1e9:g} GB of state: {facts['blocking pause']} to save it blocking, "
        f"{facts['write and upload']} to write and upload it behind the training, "
        f"with steps {facts['slowdown']:.1%} slower meanwhile.\nA restart takes {facts['restart seconds']} s, every "
        f"machine goes with its disk, {facts['announced']:.0%} of the interruptions are announced. "
        f"Medians of {facts['seeds']} traces.",
        ha="center",
        va="top",
        fontsize=10,
        color="#444444",
    )
    by_rate(axes[0][0], document, styles)
    by_interval(axes[0][1], document, styles)
    by_part(axes[1][0], document, styles)
    by_upload(axes[1][1], document, styles)
    with picture.open("wb") as file:
        FigureCanvasAgg(figure).print_png(file)


def by_rate(axis: Axes, document: dict[str, Any], styles: dict[str, Any]) -> None:
    """Share wasted over the rate of interruptions: medians, and the way to the 90th percentile."""
    tables = {float(key.split()[1]): table for key, table in document["policies"].items() if key.startswith("Poisson")}
    rates = sorted(tables)
    # a notice changes nothing at this upload rate: the last panel shows where it does
    for name, style in list(styles.items())[:4]:
        shares = [tables[rate][name]["share"] for rate in rates]
        worst = [tables[rate][name]["share p90"] for rate in rates]
        axis.plot(rates, shares, **style, label=name, markersize=6)
        axis.fill_between(rates, shares, worst, color=style["color"], alpha=0.12, linewidth=0)
    axis.set_title("by how often machines are lost (Poisson; shaded up to the 90th percentile)", fontsize=11)
    axis.set_xlabel("interruptions a day")
    axis.legend(fontsize=10, loc="upper left", framealpha=0.95)
    logarithmic(axis, rates, lambda rate: f"{rate:g}")
    shares_up(axis)


def by_interval(axis: Axes, document: dict[str, Any], styles: dict[str, Any]) -> None:
    """Share wasted over the interval between saves, and where `auto` settles."""
    sweep = document["share by interval"]
    names = list(styles)
    for way, name, label in (
        ("blocking", names[0], "torch.save, blocking"),
        ("background", names[2], "background"),
    ):
        points = sorted((float(every), share) for every, share in sweep[way].items())
        axis.plot(*zip(*points, strict=True), **styles[name], markersize=6, label=label)
    ((every, share),) = ((float(every), share) for every, share in sweep["auto"].items())
    colour = styles[names[3]]["color"]
    axis.plot([every], [share], "*", markersize=20, color=colour, markeredgecolor="white", zorder=5)
    axis.annotate(
        f"auto: about every {every / 60:.0f} min, {share:.1%}",
        (every, share),
        (0, -26),
        textcoords="offset points",
        ha="center",
        color=colour,
        fontsize=11,
    )
    axis.set_title("by the interval between saves (2 interruptions a day)", fontsize=11)
    axis.set_xlabel("minutes between saves")
    axis.legend(fontsize=10, loc="upper right", framealpha=0.95)
    logarithmic(axis, [180, 300, 600, 1200, 1800, 3600, 7200], lambda seconds: f"{seconds / 60:g}")
    shares_up(axis)


def by_part(axis: Axes, document: dict[str, Any], styles: dict[str, Any]) -> None:
    """Where the GPU hours go, as stacked bars."""
    table = document["policies"][USUAL]
    names = list(styles)
    places = [name.replace(", every", ",\nevery").replace(" heeded", "\nheeded") for name in names]
    left = [0.0] * len(names)
    for part, (colour, hatch, label) in PARTS.items():
        hours = [table[name]["mean gpu hours by part"][part] for name in names]
        axis.barh(places, hours, left=left, color=colour, hatch=hatch, edgecolor="white", label=label, height=0.7)
        left = [start + more for start, more in zip(left, hours, strict=True)]
    for place, total in enumerate(left):
        money = total / document["simulated"]["gpus"] * document["simulated"]["price"]
        axis.annotate(f"{total:,.0f} h, ${money:,.0f}", (total, place), (6, 0), textcoords="offset points", va="center")
    axis.invert_yaxis()
    axis.set_xlim(0, max(left) * 1.6)
    axis.set_title("by what it goes into (2 interruptions a day, mean of the traces)", fontsize=11)
    price = document["simulated"]["price"]
    axis.set_xlabel(f"GPU hours wasted; money at ${price:g} an hour for the machine")
    axis.legend(fontsize=9.5, loc="lower right", framealpha=0.95)
    axis.spines[["top", "right"]].set_visible(False)


def by_upload(axis: Axes, document: dict[str, Any], styles: dict[str, Any]) -> None:
    """Share wasted over the upload rate: a notice is worth something once a checkpoint fits into it."""
    for name, points in document["share by upload rate"].items():
        rates = [float(rate) / 1e9 for rate in points]
        axis.plot(rates, list(points.values()), **styles[name], markersize=6, label=name)
    here = document["simulated"]["upload"] / 1e9
    axis.axvline(here, color="#777777", linewidth=1, linestyle=(0, (1, 2)))
    axis.annotate(
        "the other\npanels",
        (here, 0),
        (-4, 4),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="right",
        color="#555555",
        fontsize=9,
    )
    axis.set_title("by how fast the machine uploads (2 interruptions a day)", fontsize=11)
    axis.set_xlabel("upload in GB/s, all ranks together")
    axis.legend(fontsize=10, loc="upper right", framealpha=0.95)
    logarithmic(axis, [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8], lambda rate: f"{rate:g}")
    shares_up(axis)
    axis.set_ylim(top=1.3 * axis.get_ylim()[1])


def logarithmic(axis: Axes, ticks: list[float], text: Any) -> None:
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))


def shares_up(axis: Axes) -> None:
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_locator(MaxNLocator(9, steps=[1, 2, 5, 10]))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    axis.set_ylabel("share of the GPU time wasted")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    results = Path(__file__).parent / "results"
    draw(json.loads((results / "fleet.json").read_text()), results / "fleet.png")
