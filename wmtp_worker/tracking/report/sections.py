"""What stands in each part of the page, for one run or several."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from wmtp_worker.tracking.report import values
from wmtp_worker.tracking.report.chart import Chart, Line, Style, Table, chart, percent, spell
from wmtp_worker.tracking.report.record import Columns, Numbers, Record
from wmtp_worker.tracking.report.tokens import Coloured, coloured, reach, scale
from wmtp_worker.tracking.report.verdict import duration, validation
from wmtp_worker.weighting.bins import EDGES

NATS, ABSENT = "nats per token", "-"


@dataclass(frozen=True)
class Section:
    """A part of the page; one without anything in it is left out."""

    anchor: str
    title: str
    text: str = ""
    charts: Sequence[Chart | None] = ()
    tables: Sequence[Table] = ()
    folded: Sequence[Table] = ()  # to be opened
    tokens: Sequence[Coloured] = ()
    scale: Sequence[str] = ()  # of their colours

    def __bool__(self) -> bool:
        return any((self.drawn, self.tables, self.folded, self.tokens))

    @property
    def drawn(self) -> list[Chart]:
        return [chart for chart in self.charts if chart is not None]

    @property
    def moments(self) -> list[str]:
        """When the tokens were weighed, in words that fit every run."""
        steps = [run.steps for run in self.tokens]
        if all(other == steps[0] for other in steps):
            return [f"step {step:,}" for step in steps[0]]
        most = max(map(len, steps))
        return ["first", *(f"{k}/{most - 1}" for k in range(1, most - 1)), "last"]

    @property
    def chosen(self) -> int:
        """Whose tokens are shown at first: the first run's that tells them apart."""
        return next((i for i, run in enumerate(self.tokens) if run.family != "uniform"), 0)


def sections(records: Sequence[Record]) -> list[Section]:
    """All that have something to show, in the order of the page."""
    alone = len(records) == 1
    loss = _losses(records[0]) if alone else _compared_losses(records)
    found = [
        *([] if alone else [_runs(records)]),
        loss,
        _weights(records),
        Section("value", "Value model", values.ABOUT, values.charts(records)),
        _optimiser(records),
        _throughput(records),
        _saves(records),
        _interruptions(records),
        _settings(records),
    ]
    return [section for section in found if section]


def each(records: Sequence[Record], column: str, kind: str = "train", style: Style = "band") -> list[Line]:
    """A line for each run of one quantity, without those that have none; a run has the same colour everywhere."""
    return [
        Line(_named(record, records), record.of(kind)["step"], record.of(kind)[column], k, style)
        for k, record in enumerate(records, start=1)
        if column in record.of(kind)
    ]


def _named(record: Record, records: Sequence[Record]) -> str:
    """A line's name: that of its run, where there are several."""
    return record.name if len(records) > 1 else "last"


def by_head(columns: Columns, name: str, style: Style = "line") -> list[Line]:
    return [
        Line(f"head {k}", columns["step"], each_head, k, style)
        for k, each_head in enumerate(columns.each(name), start=1)
    ]


def _losses(record: Record) -> Section:
    train, checked = record.of("train"), record.of("validation")
    if "loss" not in checked and "loss" not in train:
        return Section("loss", "Loss", values.OBJECTIVE, [values.losses("Loss", record)])
    steps = train["step"]
    lines = [Line("training", steps, train["loss"], 2, "band")]
    if "unweighted_loss" in train and not np.allclose(train["unweighted_loss"], train["loss"], equal_nan=True):
        lines = [
            Line("training, weighted", steps, train["loss"], 2, "faint"),
            Line("training, unweighted", steps, train["unweighted_loss"], 3),
        ]
    lines.append(Line("validation", checked["step"], checked["loss"], 1, "dots"))
    unweighted = "unweighted_head_loss" if "unweighted_head_loss/0" in train else "head_loss"
    return Section(
        "loss",
        "Loss",
        "Mean over the heads; head k predicts the token k positions ahead. Shaded: the range within each stretch.",
        [
            chart("Loss", lines, NATS),
            chart("Validation loss by head", by_head(checked, "head_loss", "dots"), NATS, dashed=True),
            chart("Training loss by head", by_head(train, unweighted), f"{NATS}, unweighted", dashed=True),
            chart(
                "Validation accuracy by head",
                by_head(checked, "head_accuracy", "dots"),
                "how often the likeliest token is the true one",
                zero=True,
                share=True,
                dashed=True,
            ),
            values.losses("Stage 1: loss of the value model", record.value) if record.value else None,
        ],
    )


def _compared_losses(records: Sequence[Record]) -> Section:
    heads = max((len(record.of("validation").each("head_loss")) for record in records), default=0)
    charts = [
        chart("Validation loss", each(records, "loss", "validation", "dots"), NATS),
        chart("Training loss", each(records, "unweighted_loss"), f"{NATS}, every weight 1"),
    ]
    for k in range(heads if heads > 1 else 0):
        lines = each(records, f"head_loss/{k}", "validation", "dots")
        charts.append(chart(f"Validation loss of head {k + 1}", lines, NATS))
    for k in range(heads):
        lines = each(records, f"head_accuracy/{k}", "validation", "dots")
        charts.append(chart(f"Validation accuracy of head {k + 1}", lines, zero=True, share=True))
    models = [record.value or record for record in records]
    charts += [
        chart("Stage 1: validation loss of the value models", each(models, "value_loss", "validation", "dots")),
        chart("Stage 1: training loss of the value models", each(models, "value_loss")),
    ]
    return Section("loss", "Loss", "Validation is never weighted: this is what families are compared by.", charts)


def _runs(records: Sequence[Record]) -> Section:
    rows = []
    for record in records:
        losses, tokens = validation(record), record.of("train")["tokens"]
        accuracy = record.of("validation").each("head_accuracy")
        rows.append(
            [
                record.name,
                record.family or ABSENT,
                str(record.settings.get("run.seed", ABSENT)),
                f"{record.step:,}",
                spell(losses.values[losses.best]) if losses else ABSENT,
                spell(losses.values[-1]) if losses else ABSENT,
                percent(accuracy[0][-1]) if accuracy else ABSENT,
                f"{np.nansum(tokens):,.0f}",
                duration(record.running) if record.running is not None else ABSENT,
                ABSENT if record.cost is None else f"{record.cost:,.2f}",
            ]
        )
    header = ["run", "weights", "seed", "steps", "lowest loss", "last loss", "accuracy", "tokens", "time", "cost"]
    return Section(
        "runs", "Runs", "Losses and accuracy (of head 1) are those of validation.", tables=[Table(header, rows)]
    )


# --- weights -------------------------------------------------------------------------------------------------


def _weights(records: Sequence[Record]) -> Section:
    weighted = [record for record in records if np.nansum(record.of("train")["weight_std"]) > 0]
    names = {_named(record, records) for record in weighted}

    def of_weighted(column: str) -> list[Line]:
        return [line for line in each(records, column) if line.name in names]

    charts = [_histogram(record, len(records) > 1) for record in weighted]
    charts += [
        chart("Entropy of the weights", of_weighted("weight_entropy"), "1: all equal, 0: all on one token"),
        chart("Standard deviation of the weights", of_weighted("weight_std"), zero=True),
    ]
    if len(records) == 1 and weighted:
        train = records[0].of("train")
        bounds = [
            Line("largest", train["step"], train["weight_max"], 2),
            Line("smallest", train["step"], train["weight_min"], 1),
        ]
        charts.append(chart("Smallest and largest weight of a step", bounds, zero=True))
        clipped = [
            Line(words, train["step"], train[name], k)
            for k, (name, words) in enumerate(
                (("weight_clip_ratio", "weights"), ("advantage_clip_ratio", "exp(A / β)")), 1
            )
            if name in train
        ]
        charts.append(chart("Share on a bound", clipped, "cut to weighting.min or .max", zero=True, share=True))
        charts += _ingredients(train)
    octaves = reach(records)
    tokens = [found for record in records if (found := coloured(record, octaves)) is not None]
    return Section(
        "weights",
        "Token weights",
        "A few training samples, weighed while training went on. Each token is coloured by the weight of the loss of "
        "predicting it, by the head chosen."
        if tokens
        else "",
        charts,
        tokens=tokens,
        scale=scale(octaves),
    )


def _ingredients(train: Columns) -> list[Chart | None]:
    """What the weights of a family are made from, whatever that is."""
    names = {"td_error": "TD error", "advantage": "Advantage", "excess_loss": "Excess loss", "kl": "KL penalty"}
    found = [
        chart(f"{words}, mean of a step", [Line("mean", train["step"], train[f"{name}_mean"], 1, "band")])
        for name, words in names.items()
        if f"{name}_mean" in train
    ]
    heads = [name for name in train.names() if name.startswith("importance_head_") and name.endswith("_mean")]
    heads = [name for name in heads if "_ema_" not in name]
    lines = [
        Line(f"head {name.split('_')[2]}", train["step"], train[name], k)
        for k, name in enumerate(sorted(heads), start=1)
    ]
    return [*found, chart("Importance by head", lines, "norm of the gradient, mean of a step", zero=True, dashed=True)]


def _histogram(record: Record, named: bool) -> Chart | None:
    """Shares of the weights by size, of the first and the last quarter of what is on record."""
    rows = record.of("train").histograms
    rows = [(step, counts) for step, counts in rows if len(counts) == len(EDGES) + 2]
    if not rows:
        return None
    quarter = max(1, len(rows) // 4)
    parts = [rows[-quarter:], rows[:quarter]] if len(rows) > 1 else [rows]
    # in octaves: one bin below the lowest edge is for 0, one for what is smaller than the edge
    width = float(np.log2(EDGES[1] / EDGES[0]))
    edges = np.log2(EDGES[0]) + width * np.arange(-2, len(EDGES) + 1)
    shares = []
    for part in parts:
        counts = np.sum([counts for _, counts in part], axis=0).astype(float)
        shares.append(counts / max(counts.sum(), 1))
    used = np.flatnonzero(np.sum(shares, axis=0))
    low, high = max(0, used[0] - 1), min(len(edges) - 1, used[-1] + 2)

    def label(octave: float) -> str:
        if octave < np.log2(EDGES[0]) - width:
            return "0"
        return (
            spell(2.0**octave)
            if octave >= 0
            else f"1/{spell(2.0**-octave)}"
            if octave == int(octave)
            else spell(2.0**octave)
        )

    lines = []
    for k, (part, share) in enumerate(zip(parts, shares, strict=True)):
        steps = f"steps {part[0][0]:,} to {part[-1][0]:,}" if len(part) > 1 else f"step {part[0][0]:,}"
        lines.append(Line(steps, edges[low : high + 1], np.append(share[low:high], 0.0), k + 1, "bars"))
    title = f"Weights of {record.name}" if named else "Weights by size"
    return chart(title, lines, "share of the labelled tokens", "weight", zero=True, share=True, x_number=label)


# --- how it ran ----------------------------------------------------------------------------------------------


def _optimiser(records: Sequence[Record]) -> Section:
    return Section(
        "optimiser",
        "Learning rate and gradient",
        charts=[
            chart("Learning rate", each(records, "lr", style="line"), zero=True),
            chart("Norm of the gradient", each(records, "grad_norm"), "before it is clipped", zero=True),
        ],
    )


def _throughput(records: Sequence[Record]) -> Section:
    def derived(values: Any) -> list[Line]:
        return [
            Line(_named(record, records), train["step"], values(train), k, "band")
            for k, record in enumerate(records, start=1)
            if len(train := record.of("train")) and "seconds" in train
        ]

    def rate(train: Columns) -> Numbers:
        return train["tokens"] / np.where(train["seconds"] > 0, train["seconds"], np.nan)

    def wait(train: Columns) -> Numbers:
        return train["wait"] / np.where(train["seconds"] > 0, train["seconds"], np.nan)

    waited = any("wait" in record.of("train") for record in records)
    return Section(
        "throughput",
        "Throughput",
        charts=[
            chart("Tokens per second", derived(rate), "padding left out", zero=True),
            chart("Wait for data", derived(wait) if waited else [], "share of a step", zero=True, share=True),
            chart("Packing", each(records, "packing"), "share of the batch that is not padding", share=True),
        ],
    )


def _saves(records: Sequence[Record]) -> Section:
    saving = [record for record in records if record.saves]
    colours = {id(record): k for k, record in enumerate(records, start=1)}
    rows = []
    for record in saving:
        pauses, carried = [save.pause for save in record.saves], [s.carry for s in record.saves if s.carry is not None]
        share = f"{sum(pauses) / record.running:.2%}" if record.running else ABSENT
        rows.append(
            [
                record.name,
                f"{len(pauses):,}",
                duration(statistics.median(pauses)),
                duration(max(pauses)),
                duration(sum(pauses)),
                share,
                duration(statistics.median(carried)) if carried else ABSENT,
            ]
        )
    lines = []
    for record in saving:
        steps, pauses = [save.step for save in record.saves], [1000 * save.pause for save in record.saves]
        lines.append(Line(_named(record, records), steps, pauses, colours[id(record)], "dots"))
    header = ["run", "saves", "pause, median", "longest", "all together", "of the time", "until safe, median"]
    return Section(
        "saves",
        "Saves",
        "A save stands still only while the copy of the weights is begun; it is written behind the training.",
        [chart("Pause of the training for a save", lines, "milliseconds", zero=True)],
        [Table(header, rows)] if rows else [],
    )


def _interruptions(records: Sequence[Record]) -> Section:
    tables = []
    for record in records:
        rows = [
            [
                f"{datetime.fromtimestamp(item['time'], UTC):%Y-%m-%d %H:%M:%S}",
                item["host"],
                item["how"],
                f"{item['reached']:,}",
                f"{item['resumed_from'] or 0:,}",
                f"{item['steps']:,}",
                duration(item["work_seconds"]),
                duration(sum(item["restart"].values())),
                ABSENT if item["away"] is None else duration(item["away"]),
                ABSENT if item["money"] is None else f"{item['money']:,.2f}",
            ]
            for item in record.losses.get("interruptions", ())
        ]
        if rows:
            caption = record.losses_sentence if len(records) == 1 else f"{record.name}: {record.losses_sentence}"
            tables.append(Table(_INTERRUPTION, rows, caption))
    return Section("interruptions", "Interruptions", tables=tables)


_INTERRUPTION = [
    "went on (UTC)",
    "host",
    "ended by",
    "reached",
    "from step",
    "steps lost",
    "work",
    "restart",
    "away",
    "money",
]


# --- settings ------------------------------------------------------------------------------------------------


def _settings(records: Sequence[Record]) -> Section:
    keys = list(dict.fromkeys(key for record in records for key in record.settings))
    rows = {key: [_value(record.settings.get(key, ABSENT)) for record in records] for key in keys}
    all_rows = [[key, *cells] for key, cells in rows.items()]
    if not all_rows:
        return Section("settings", "Settings")
    if len(records) == 1:
        return Section(
            "settings", "Settings", folded=[Table(["setting", "value"], all_rows, "All settings", words=True)]
        )
    header = ["setting", *(record.name for record in records)]
    differing = [row for row in all_rows if len(set(row[1:])) > 1]
    return Section(
        "settings",
        "Settings",
        tables=[Table(header, differing, "Those that differ", words=True)] if differing else [],
        folded=[Table(header, all_rows, "All settings", words=True)],
    )


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
