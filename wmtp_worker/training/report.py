"""The report of a run, from the files it leaves in its logs; and the one that compares several."""

import logging
from collections.abc import Sequence
from json import JSONDecodeError, loads
from pathlib import Path
from typing import Any

from wmtp_worker.checkpoint.ledger import End, Event, Save, Start, read_ledger
from wmtp_worker.checkpoint.losses import summarise
from wmtp_worker.errors import InputError, WorkerError
from wmtp_worker.redact import redact_values
from wmtp_worker.settings import Settings
from wmtp_worker.settings.stages import value_name
from wmtp_worker.storage.atomic import write_json, write_text
from wmtp_worker.storage.layout import RunPaths, RunRecord
from wmtp_worker.tracking import report

log = logging.getLogger(__name__)


def note_settings(settings: Settings, paths: RunPaths) -> None:
    """Put the run's settings beside its metrics, without secrets; a disk that does not take them is warned of."""
    try:
        write_json(paths.record.settings, redact_values(settings.flat()))
    except WorkerError as error:
        log.warning("the settings are not recorded: %s", error)


def find_record(run: str, workdir: Path) -> RunRecord:
    """The logs of a run by its name in the work directory, or by their folder. Raises `InputError`."""
    folders = [folder for folder in (RunPaths(workdir, run).logs, Path(run)) if RunRecord(folder).metrics.is_file()]
    if folders:
        return RunRecord(folders[0])
    names = sorted(path.parent.name for path in (workdir / "logs").glob("*/metrics.jsonl"))
    here = f"choose one of {', '.join(names)}; " if names else ""
    raise InputError(
        f"there is no record of a run {run!r}",
        where=str(RunPaths(workdir, run).metrics),
        fix=f"{here}what is only in the bucket comes with: "
        f"wmtp sync pull <bucket's URL>/logs/{run} {RunPaths(workdir, run).logs}",
    )


def write_report(records: Sequence[RunRecord], path: Path) -> None:
    """Write the page of one run, or a comparison of several, atomically. Raises `DiskFullError`, `InputError`."""
    write_text(path, report.render([read_record(record) for record in records]))


def read_record(record: RunRecord) -> report.Record:
    """All that a run's logs tell; what is absent or unreadable is left out."""
    events = read_ledger(record.ledger)
    losses = summarise(events)
    running = losses.days * 86400 if losses.processes else None
    end = events[-1] if events and isinstance(events[-1], End) else None
    value = RunRecord(record.folder.with_name(value_name(record.folder.name)))
    return report.Record(
        name=record.folder.absolute().name,
        metrics=report.read_metrics(record.metrics),
        weights=report.read_weights(record.weights),
        settings=_settings(record.settings),
        status=end.how if end else "open",
        detail=end.detail if end else "",
        began=events[0].time if events else None,
        running=running,
        cost=_cost(events, running),
        saves=[report.Save(event.step, event.pause, event.carry) for event in events if isinstance(event, Save)],
        losses=losses.to_json() if losses.processes else {},
        losses_sentence=losses.sentence() if losses.processes else "",
        value=read_record(value) if value.metrics.is_file() else None,
    )


def _settings(path: Path) -> dict[str, Any]:
    try:
        document = loads(path.read_bytes())
    except (OSError, JSONDecodeError, UnicodeDecodeError):
        return {}
    return document if isinstance(document, dict) else {}


def _cost(events: Sequence[Event], running: float | None) -> float | None:
    """Of all the time; None where machines had different prices, or one had none."""
    prices = {event.price_per_hour for event in events if isinstance(event, Start)}
    price = prices.pop() if len(prices) == 1 else None
    return None if price is None or running is None else price * running / 3600
