"""How well the value model knows which solutions will be right."""

from collections.abc import Sequence

from wmtp_worker.tracking.report.chart import Chart, Line, Style, chart
from wmtp_worker.tracking.report.record import Record

_KINDS: tuple[tuple[int, str, Style], ...] = ((0, "train", "band"), (-1, "validation", "dots"))
_CURVES = {
    "value_loss": "Value loss",
    "pairwise_accuracy": "Pairwise accuracy",
    "explained_variance": "Explained variance",
    "token_explained_variance": "Explained variance of all tokens",
    "calibration": "Calibration error",
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
    bins = record.of("validation").reliability
    if not isinstance(bins, list) or not bins:
        return None
    foretold, correct = [one[0] for one in bins], [one[1] for one in bins]
    lines = [Line("perfect", [0, 1], [0, 1], 2, "dashed"), Line("correct in fact", foretold, correct, 1, "dots")]
    title = f"Calibration of {record.name}" if named else "Calibration"
    return chart(title, lines, "share of correct solutions", "probability foretold", zero=True, top=1.0)
