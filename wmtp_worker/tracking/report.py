"""The picture of a run: losses, accuracy of the heads, learning rate and throughput over the steps."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from wmtp_worker.storage.atomic import atomic_path
from wmtp_worker.tracking.metrics import read

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(metrics: Path, picture: Path, title: str) -> None:
    """Draw `metrics.jsonl` into a PNG, replaced atomically. Needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read(metrics)
    train = [record for record in records if record["kind"] == "train"]
    validation = [record for record in records if record["kind"] == "validation"]
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    figure.suptitle(title)
    _losses(axes[0][0], train, validation)
    _accuracies(axes[0][1], validation)
    _optimizer(axes[1][0], train)
    _throughput(axes[1][1], train)
    for axis in axes.flat:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    with atomic_path(picture) as written, written.open("wb") as file:
        FigureCanvasAgg(figure).print_png(file)


def _column(records: list[dict[str, Any]], key: str) -> list[float]:
    return [record[key] for record in records]


def _losses(axis: "Axes", train: list[dict[str, Any]], validation: list[dict[str, Any]]) -> None:
    steps = _column(train, "step")
    values = bool(train) and "value_loss" in train[0]
    loss, what = ("value_loss", "training") if values else ("loss", "training, mean of heads")
    axis.plot(steps, _column(train, loss), color="black", linewidth=1.5, label=what)
    for head in range(len(train[0].get("head_loss", ())) if train else 0):
        losses = [record["head_loss"][head] for record in train]
        axis.plot(steps, losses, linewidth=0.7, alpha=0.6, label=f"head {head + 1}")
    axis.plot(_column(validation, "step"), _column(validation, loss), "o-", color="tab:red", label="validation")
    axis.set_title("value loss" if values else "loss (nats per token)")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize="small")


def _accuracies(axis: "Axes", validation: list[dict[str, Any]]) -> None:
    if validation and "pairwise_accuracy" in validation[0]:
        for key in ("pairwise_accuracy", "explained_variance", "calibration"):
            axis.plot(_column(validation, "step"), _column(validation, key), "o-", label=key.replace("_", " "))
        axis.set_title("validation of the values")
        axis.legend(fontsize="small")
        return
    for head in range(len(validation[0]["head_accuracy"]) if validation else 0):
        shares = [record["head_accuracy"][head] for record in validation]
        axis.plot(_column(validation, "step"), shares, "o-", label=f"head {head + 1}")
    axis.set_title("validation accuracy by head")
    axis.set_ylim(bottom=0)
    if validation:
        axis.legend(fontsize="small")


def _optimizer(axis: "Axes", train: list[dict[str, Any]]) -> None:
    axis.plot(_column(train, "step"), _column(train, "lr"), color="tab:blue")
    axis.set_title("learning rate (blue) and gradient norm (grey)")
    norms = axis.twinx()
    norms.plot(_column(train, "step"), _column(train, "grad_norm"), color="grey", linewidth=0.7)
    norms.set_ylim(bottom=0)


def _throughput(axis: "Axes", train: list[dict[str, Any]]) -> None:
    rates = [record["tokens"] / record["seconds"] for record in train]
    axis.plot(_column(train, "step"), rates, color="tab:green", linewidth=0.8)
    axis.set_title("useful tokens per second (padding left out)")
    axis.set_ylim(bottom=0)
