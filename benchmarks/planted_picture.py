"""The picture of planted.json and planted_runs.jsonl. Also by itself: python benchmarks/planted_picture.py"""

import json
import statistics
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with any kind of colour vision; markers and dashes say the same again
STYLES: dict[str, dict[str, Any]] = {
    "uniform": {"color": "#000000", "marker": "o", "linestyle": "-"},
    "critic": {"color": "#CC79A7", "marker": "v", "linestyle": "-."},
    "verifiable": {"color": "#F0E442", "marker": "P", "linestyle": "-."},
    "rho1_weighted": {"color": "#0072B2", "marker": "s", "linestyle": "-"},
    "rho1_tokenskip": {"color": "#56B4E9", "marker": "D", "linestyle": "--"},
    "gradient": {"color": "#D55E00", "marker": "^", "linestyle": "--"},
    "grpo": {"color": "#009E73", "marker": "X", "linestyle": ":"},
    "uniform, right solutions only": {"color": "#888888", "marker": "o", "linestyle": ":"},
}
# filled, half and hollow: what is left of the family in each
SIDES = (("", "o", "the family"), (", shuffled", "s", "shuffled"), (", random_matched", "^", "random_matched"))
KINDS = {
    "planted": ("#0072B2", "", "planted, right"),
    "mistaken": ("#D55E00", "//", "planted, mistaken"),
    "noise": ("#CCCCCC", "..", "noise"),
}


def draw(document: dict[str, Any], picture: Path) -> None:
    """Draw the result of `planted.py` into a PNG."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for found in document["runs"]:
        runs.setdefault(found["arm"], []).append(found)
    families = [name for name in STYLES if name in runs]

    figure = Figure(figsize=(14, 11), layout="constrained", facecolor="white")
    axes = figure.subplots(2, 2)
    seeds = len(runs["uniform"])
    figure.suptitle(
        f"Right answers planted among noise: {document['plan']['steps']} steps, {seeds} seeds\n",
        fontsize=15,
        fontweight="bold",
    )
    curves(axes[0][0], runs, families, document["target"])
    against_controls(axes[0][1], runs, families)
    mass_bars(axes[1][0], document, families)
    mass_curves(axes[1][1], runs, families, document["share of the labels"]["planted"])
    with picture.open("wb") as file:
        FigureCanvasAgg(figure).print_png(file)


def curves(axis: Axes, runs: dict[str, Any], families: list[str], target: float) -> None:
    """Planted loss over the steps: means, shaded from the lowest to the highest seed."""
    _over_steps(axis, runs, families, lambda point: point["losses"]["planted"]["head 1"])
    axis.axhline(target, color="#777777", linewidth=1, linestyle=(0, (1, 2)))
    axis.annotate("the target", (1, target), (-4, 3), ("axes fraction", "data"), "offset points", ha="right")
    axis.set_yscale("log")
    axis.set_title("validation loss on planted tokens (head 1; shaded: all seeds)", fontsize=12)
    axis.set_ylabel("nats a token")
    axis.legend(fontsize=10)


def against_controls(axis: Axes, runs: dict[str, Any], families: list[str]) -> None:
    """Each seed's final planted loss, of a family and of its controls."""
    for place, family in enumerate(families):
        for shift, (suffix, marker, _) in zip((-0.22, 0, 0.22), SIDES, strict=True):
            final = [one["curve"][-1]["losses"]["planted"]["head 1"] for one in runs.get(family + suffix, [])]
            colour = STYLES[family]["color"]
            face = colour if not suffix else "white"
            where = [place + shift] * len(final)
            axis.plot(where, final, marker, color=colour, markerfacecolor=face, markeredgecolor=colour, markersize=8)
            if final:
                middle = statistics.fmean(final)
                axis.plot([place + shift - 0.09, place + shift + 0.09], [middle, middle], color="#444444", linewidth=2)
    for _, marker, label in SIDES:
        face = "#444444" if label == SIDES[0][2] else "white"
        axis.plot([], [], marker, color="#444444", markerfacecolor=face, label=label)
    axis.axhline(
        statistics.fmean(one["curve"][-1]["losses"]["planted"]["head 1"] for one in runs["uniform"]),
        color="#777777",
        linewidth=1,
        linestyle=(0, (1, 2)),
    )
    axis.set_xticks(range(len(families)), [_broken(name) for name in families], fontsize=9)
    axis.set_yscale("log")
    axis.set_title("planted loss at the end, each seed (dotted: uniform; bars: means)", fontsize=12)
    axis.set_ylabel("nats a token")
    axis.legend(fontsize=10)
    _plain(axis)


def mass_bars(axis: Axes, document: dict[str, Any], families: list[str]) -> None:
    """Where the weight goes, mean over the training."""
    names = [name for name in families if "right" not in name]
    for place, (kind, (colour, hatch, label)) in enumerate(KINDS.items()):
        means, spread = zip(*(document["arms"][name]["mass"][kind] for name in names), strict=True)
        where = [number + 0.27 * (place - 1) for number in range(len(names))]
        axis.bar(where, means, 0.25, yerr=spread, color=colour, hatch=hatch, edgecolor="white", label=label, capsize=3)
    axis.set_xticks(range(len(names)), [_broken(name) for name in names], fontsize=9)
    axis.set_title("share of all weight, mean over the training (uniform: the share of the tokens)", fontsize=12)
    axis.set_ylabel("share of the weight")
    axis.set_ylim(top=1.25 * axis.get_ylim()[1])
    axis.legend(fontsize=10, loc="upper left", ncols=3)
    _plain(axis)


def mass_curves(axis: Axes, runs: dict[str, Any], families: list[str], share: float) -> None:
    """How the weight on right planted tokens changes as they are learnt."""
    names = [name for name in families if not name.startswith("uniform")]
    _over_steps(axis, runs, names, lambda point: point["mass"]["planted"])
    axis.axhline(share, color="#777777", linewidth=1, linestyle=(0, (1, 2)))
    axis.annotate("uniform", (1, share), (-4, 3), ("axes fraction", "data"), "offset points", ha="right")
    axis.set_ylim(0, 1.15 * max(axis.get_ylim()[1], share))
    axis.set_title("share of the weight on right planted tokens", fontsize=12)
    axis.set_ylabel("share of the weight")
    axis.legend(fontsize=10)


def _over_steps(axis: Axes, runs: dict[str, Any], names: list[str], of: Any) -> None:
    for name in names:
        steps = [point["step"] for point in runs[name][0]["curve"]]
        values = list(zip(*([of(point) for point in one["curve"]] for one in runs[name]), strict=True))
        means = [statistics.fmean(some) for some in values]
        axis.plot(steps, means, **STYLES[name], label=name, markersize=5)
        lows, highs = [min(some) for some in values], [max(some) for some in values]
        axis.fill_between(steps, lows, highs, color=STYLES[name]["color"], alpha=0.12, linewidth=0)
    axis.set_xlabel("step")
    _plain(axis)


def _plain(axis: Axes) -> None:
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _broken(name: str) -> str:
    return name.replace("_", "_\n").replace(", right solutions only", ",\nright ones\nonly")


if __name__ == "__main__":
    results = Path(__file__).parent / "results"
    lines = (results / "planted_runs.jsonl").read_text().splitlines()
    document = json.loads((results / "planted.json").read_text()) | {"runs": [json.loads(line) for line in lines]}
    draw(document, results / "planted.png")
