"""How well the value model knows which solutions will be right."""

from collections.abc import Sequence

import numpy as np

from wmtp_worker.tracking.report.chart import Chart, Line, Style, chart
from wmtp_worker.tracking.report.record import Record

_KINDS: tuple[tuple[int, str, Style], ...] = ((0, "train", "band"), (-1, "validation", "dots"))
_CURVES = {
    "value_loss": "Value loss",
    "pairwise_accuracy": "Pairwise accuracy",
    "explained_variance": "Explained variance",
}


ABOUT = "How well the model that judges unfinished solutions foretells which will be correct."


def charts(records: Sequence[Record]) -> list[Chart | None]:
    """The value models of these runs, trained by a run of their own or as one."""
    models = [(k, record.value or record) for k, record in enumerate(records, start=1)]
    found: list[Chart | None] = []
    for column, title in _CURVES.items():
        lines = [
            Line(f"{record.name}, {kind}" if len(records) > 1 else kind, of["step"], of[column], 2 * k + other, style)
            for k, record in models
            for other, kind, style in _KINDS
            if column in (of := record.of(kind))
        ]
        found.append(chart(title, lines))
    return [*found, *(_calibration(record, len(records) > 1) for _, record in models)]


def _calibration(record: Record, named: bool) -> Chart | None:
    """What was foretold against what came true."""
    bins = record.of("validation").calibration
    if not isinstance(bins, list) or not all(isinstance(item, dict) for item in bins):
        return None
    points = [(item.get("predicted"), item.get("observed")) for item in bins if item.get("count", 1)]
    known = np.array([point for point in points if None not in point], np.float64).reshape(-1, 2)
    lines = [Line("correct in fact", known[:, 0], known[:, 1], 1, "dots"), Line("perfect", [0, 1], [0, 1], 2, "dashed")]
    title = f"Calibration of {record.name}" if named else "Calibration"
    found = chart(title, lines, "share of correct solutions", "value foretold", zero=True, top=1.0)
    return found if len(known) else None
