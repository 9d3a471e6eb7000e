"""Logging to the console and to `training.log`, and a progress bar where somebody is watching."""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from logging.handlers import MemoryHandler, RotatingFileHandler
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from wmtp_worker.errors import WorkerError
from wmtp_worker.redact import RedactingFilter
from wmtp_worker.storage.atomic import disk_errors

LOGGER = "wmtp_worker"
_FORMAT = "%(asctime)s %(levelname)-7s %(message)s"
_LOG_BYTES = 10_000_000
_EARLY_RECORDS = 100_000
Form = Literal["text", "json"]


class _JsonFormatter(logging.Formatter):
    """One JSON object a line, for machines that collect logs."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_text:  # the redacting filter has made it
            line["exception"] = record.exc_text
        return json.dumps(line, ensure_ascii=False)


def _formatter(form: Form) -> logging.Formatter:
    return _JsonFormatter() if form == "json" else logging.Formatter(_FORMAT)


@contextmanager
def logging_to_console(level: str, console: Console, form: Form = "text") -> Iterator[None]:
    """While it lasts, what this package logs goes to `console`, from `level` on."""
    screen: logging.Handler
    if console.is_terminal and form == "text":
        screen = RichHandler(console=console, show_path=False, omit_repeated_times=False, log_time_format="%H:%M:%S")
    else:
        screen = logging.StreamHandler(console.file)
        screen.setFormatter(_formatter(form))
    screen.setLevel(level.upper())
    logger = logging.getLogger(LOGGER)
    before = logger.level, logger.propagate
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        with _handler(screen):
            yield
    finally:
        logger.setLevel(before[0])
        logger.propagate = before[1]


class LogFile:
    """All that this package logs, appended to a file (rotated). A context manager.

    Until `open` it is kept in memory: an earlier machine's log may have to come from the bucket first. Leaving opens
    the file too, so that what ended a run early is in it.
    """

    def __init__(self, path: Path, form: Form = "text") -> None:
        self._path = path
        self._form = form
        self._early = MemoryHandler(_EARLY_RECORDS, flushLevel=logging.CRITICAL + 1)

    def open(self) -> None:
        """Write what was kept, and from now on everything at once. Raises `DiskFullError`, `InputError`."""
        with disk_errors(self._path.parent):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file = _RunLog(self._path, maxBytes=_LOG_BYTES, backupCount=3, encoding="utf-8")
        file.setFormatter(_formatter(self._form))
        file.addFilter(RedactingFilter())
        self._early.setTarget(file)
        self._early.flush()
        self._early.capacity = 1

    def __enter__(self) -> Self:
        logging.getLogger(LOGGER).addHandler(self._early)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        logging.getLogger(LOGGER).removeHandler(self._early)
        if self._early.target is None:
            with suppress(WorkerError):  # the run has ended with a reason of its own
                self.open()
        file = self._early.target
        self._early.close()
        if file is not None:
            file.close()


class _RunLog(RotatingFileHandler):
    """Says once, on the console, that the disk does not take what is logged; that never ends a run."""

    _failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        if isinstance(error := sys.exception(), OSError):
            self._say(error)
        else:
            super().handleError(record)

    def close(self) -> None:
        try:
            super().close()
        except OSError as error:  # what waited for room, or a network file system that says so only now
            self._say(error)

    def _say(self, error: OSError) -> None:
        if not self._failed:
            self._failed = True  # first: the warning comes back here
            reason = error.strerror or error
            logging.getLogger(LOGGER).warning("%s lacks lines from here on: %s", self.baseFilename, reason)


@contextmanager
def _handler(handler: logging.Handler) -> Iterator[None]:
    handler.addFilter(RedactingFilter())
    logger = logging.getLogger(LOGGER)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


class StepBar:
    """A live bar over steps, optimizer's or others, on a terminal; nothing in a pipe: the log lines say it all."""

    def __init__(self, console: Console, total: int, completed: int, title: str = "training") -> None:
        self._progress = Progress(
            TextColumn(title),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(title, total=total, completed=completed, note="")

    def update(self, completed: int, note: str) -> None:
        self._progress.update(self._task, completed=completed, note=note)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # a terminal that hung up must not hide why the run ends
            self._progress.stop()
