"""Records into a page. What it looks like is in `page.html`, `page.css` and `page.js`."""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

import numpy as np

from wmtp_worker import __version__
from wmtp_worker.redact import Redactor
from wmtp_worker.tracking.report.chart import spell
from wmtp_worker.tracking.report.record import Record
from wmtp_worker.tracking.report.sections import sections
from wmtp_worker.tracking.report.verdict import counted, duration, of_comparison, of_run, validation


@dataclass(frozen=True)
class Figure:
    name: str
    value: str
    note: str = ""


def render(records: Sequence[Record]) -> str:
    """The page of one run, or of a comparison of several: HTML that asks for nothing outside itself.

    Whatever comes from a run is text, escaped and without the secrets of this environment.
    """
    # here: a training should not wait for it
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    one = records[0] if len(records) == 1 else None
    heading = ", ".join(record.name for record in records)
    folder, redact = files("wmtp_worker.tracking.report"), Redactor()
    html, style, script = (
        folder.joinpath(f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")
    )

    def shown(value: Any) -> Any:
        return redact(value) if type(value) is str else value

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=shown, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(html).render(
        title=heading if one else f"Comparison of {heading}",
        heading=heading,
        kind="Training run" if one else f"Comparison of {len(records)} runs",
        about=_about(one) if one else [],
        verdict=of_run(one) if one else of_comparison(records),
        figures=_figures(one) if one else [],
        sections=sections(records),
        style=Markup(style),
        script=Markup(script),
        # the only script that a browser will run in this page
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        version=__version__,
    )


def _about(record: Record) -> list[str]:
    facts = [record.family and f"weights: {record.family}"]
    for key, words in (("data.dataset", "data"), ("model.path", "model"), ("run.seed", "seed")):
        if record.settings.get(key) is not None:
            facts.append(f"{words}: {record.settings[key]}")
    if record.began is not None:
        facts.append(f"{datetime.fromtimestamp(record.began, UTC):begun %Y-%m-%d %H:%M} UTC")
    return [fact for fact in facts if fact]


def _figures(record: Record) -> list[Figure]:
    """What somebody looks for first, as large numbers."""
    found = []
    train = record.of("train")
    if (losses := validation(record)) is not None:
        lowest = f"lowest, step {losses.steps[losses.best]:,}"
        found.append(Figure("validation loss", spell(losses.values[losses.best]), lowest))
    accuracy = record.of("validation").each("head_accuracy")
    if accuracy:
        found.append(Figure("accuracy", f"{100 * accuracy[0][-1]:.1f}%", "of head 1"))
    if "tokens" in train:
        found.append(Figure("tokens", f"{np.nansum(train['tokens']):,.0f}", f"in {record.step:,} steps"))
    if "tokens" in train and "seconds" in train and np.nansum(train["seconds"]) > 0:
        rate = np.nansum(train["tokens"]) / np.nansum(train["seconds"])
        found.append(Figure("tokens/s", f"{rate:,.0f}", "while it trains"))
    if record.running is not None:
        found.append(Figure("time", duration(record.running), "all processes"))
    if record.losses:
        items = len(record.losses.get("interruptions", ()))
        found.append(Figure("steps lost", f"{record.losses.get('steps', 0):,}", f"in {counted(items, 'interruption')}"))
    if record.cost is not None:
        found.append(
            Figure("cost", f"{record.cost:,.2f}", "what has a price" if record.unpriced else "in the price's currency")
        )
    return found
