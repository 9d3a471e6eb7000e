"""How well the value model knows which solutions will be right."""

from collections.abc import Iterator, Sequence

from wmtp_worker.tracking.report.chart import Chart, Line, Style, chart
from wmtp_worker.tracking.report.record import Columns, Record

_CURVES = {
    "value_loss": "Value loss",
    "pairwise_accuracy": "Pairwise accuracy",
    "explained_variance": "Explained variance",
    "token_explained_variance": "Explained variance of all tokens",
    "calibration": "Calibration error",
}


ABOUT = "How well the model that judges unfinished solutions foretells which will be correct."

OBJECTIVE = "The value model's objective: stage 1, from whose values the weights of the policy's tokens are made."


def losses(title: str, model: Record) -> Chart | None:
    """What a value model is trained by, over its own run."""
    train, checked = model.of("train"), model.of("validation")
    lines = [
        Line("training", train["step"], train["value_loss"], 2, "band"),
        Line("validation", checked["step"], checked["value_loss"], 1, "dots"),
    ]
    return chart(title, lines)


def charts(records: Sequence[Record]) -> list[Chart | None]:
    """The value models of these runs, trained by a run of their own or as one, and on beside the policy."""
    models = [(k, record.value or record) for k, record in enumerate(records, start=1)]
    found: list[Chart | None] = []
    own = (
        len(records) == 1 and records[0].value is None and "loss" not in records[0].of("train")
    )  # whose loss is the page's
    for column, title in _CURVES.items():
        if own and column == "value_loss":
            continue
        lines = [
            Line(f"{name}, {kind}" if len(records) > 1 else kind, of["step"], of[column], 2 * k + other, style)
            for k, record in enumerate(records, start=1)
            for name, kind, of, other, style in _told(record)
            if column in of
        ]
        found.append(chart(title, lines))
    return [*found, *(_calibration(record, len(records) > 1) for _, record in models)]


def _told(record: Record) -> Iterator[tuple[str, str, Columns, int, Style]]:
    """Whose numbers, of what, which, and how they are drawn."""
    model = record.value or record
    yield model.name, "train", model.of("train"), 0, "band"
    yield model.name, "validation", model.of("validation"), -1, "dots"
    if record.value is not None:
        yield record.name, "beside the policy", record.of("train"), 1, "band"


def _calibration(record: Record, named: bool) -> Chart | None:
    """What was foretold against what came true."""
    bins = record.of("validation").reliability
    if not isinstance(bins, list) or not bins:
        return None
    foretold, correct = [one[0] for one in bins], [one[1] for one in bins]
    lines = [Line("perfect", [0, 1], [0, 1], 2, "dashed"), Line("correct in fact", foretold, correct, 1, "dots")]
    title = f"Calibration of {record.name}" if named else "Calibration"
    return chart(title, lines, "share of correct solutions", "probability foretold", zero=True, top=1.0)
