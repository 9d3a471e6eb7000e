"""The report of a run, from the files it leaves in its logs; and the one that compares several."""

import logging
import threading
import time
from collections.abc import Sequence
from json import JSONDecodeError, loads
from pathlib import Path
from typing import Any

from wmtp_worker.checkpoint.ledger import Save, newest_end, read_ledger
from wmtp_worker.checkpoint.losses import summarise
from wmtp_worker.errors import InputError, WorkerError
from wmtp_worker.host.stop import StopRequest
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


# while somebody waits for the process to end, in seconds: for the page at most, and what it leaves to what comes after
_AT_MOST, _UNKNOWN, _LEFT = 10.0, 3.0, 5.0


def write_in_time(record: RunRecord, stop: StopRequest) -> None:
    """The run's page, unless the process was asked to stop and has no time for it: 3 seconds where nobody said how
    long it may live, else 10 at most, and until 5 remain.

    Never raises: the training is what counts, and `wmtp report` makes the page later.
    """

    def write() -> None:
        try:
            write_report([record], record.report)
        except Exception as error:
            log.warning("no report: %s", error, exc_info=not isinstance(error, WorkerError))

    # a thread, which can be left behind: the page takes its place whole or not at all
    thread = threading.Thread(target=write, name="report", daemon=True)
    asked = None
    while True:
        if stop.requested:
            asked = asked or time.monotonic()
            left, spent = stop.seconds_left, time.monotonic() - asked
            if spent > _UNKNOWN if left is None else spent > _AT_MOST or left < _LEFT:
                log.warning("no report, for want of time: wmtp report %s", record.folder.name)
                return
        if thread.ident is None:
            thread.start()
        thread.join(0.1)
        if not thread.is_alive():
            return


def read_record(record: RunRecord) -> report.Record:
    """All that a run's logs tell; what is absent or unreadable is left out."""
    events = read_ledger(record.ledger)
    losses = summarise(events)
    running = losses.days * 86400 if losses.processes else None
    end = newest_end(events)
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
        cost=losses.cost,
        unpriced=losses.unpriced,
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
