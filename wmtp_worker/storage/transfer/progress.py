"""How far a transfer is: a bar on a terminal, a line in the log every ten seconds elsewhere."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console

LOG = logging.getLogger(__name__)
LINE_SECONDS = 10.0
_BAR_SECONDS = 0.1


class Progress(Protocol):
    """Is told how far a transfer is. Called from many threads; several transfers may be under way at once."""

    def start(self, total: int | None) -> None:
        """A transfer begins, of `total` bytes where that is known."""

    def advance(self, size: int, files: int = 0) -> None:
        """So many bytes, and files, are done (bytes that were in place already count)."""

    def finish(self) -> None:
        """A transfer ended, whichever way."""


class Silent:
    """Tells nobody."""

    def start(self, total: int | None) -> None: ...

    def advance(self, size: int, files: int = 0) -> None: ...

    def finish(self) -> None: ...


class _Counting:
    """Adds up, and shows at most every `interval` seconds."""

    interval: float

    def __init__(self, title: str) -> None:
        self._title = title
        self._lock = threading.Lock()
        self._running = 0

    def start(self, total: int | None) -> None:
        with self._lock:
            if not self._running:
                self._bytes = self._files = 0
                self._total: int | None = 0
                self._begun = self._shown = time.monotonic()
            self._total = None if total is None or self._total is None else self._total + total
            self._running += 1
            if self._running == 1:
                self._open()

    def advance(self, size: int, files: int = 0) -> None:
        with self._lock:
            self._bytes += size
            self._files += files
            now = time.monotonic()
            if now - self._shown >= self.interval and self._running:
                self._shown = now
                self._show()

    def finish(self) -> None:
        with self._lock:
            self._running -= 1
            if not self._running:
                self._show()
                self._close()

    def _open(self) -> None: ...

    def _show(self) -> None: ...

    def _close(self) -> None: ...


class LogLines(_Counting):
    """A plain line to the logger every ten seconds; nothing about what takes less."""

    interval = LINE_SECONDS

    def _show(self) -> None:
        seconds = time.monotonic() - self._begun
        if seconds < self.interval:
            return
        of = f" of {self._total / 1e6:.1f}" if self._total else ""
        LOG.info(
            "%s: %.1f%s MB, %d files, %.1f MB/s",
            self._title,
            self._bytes / 1e6,
            of,
            self._files,
            self._bytes / 1e6 / seconds,
        )


class TerminalBar(_Counting):
    """A rich bar, gone when the transfer is."""

    interval = _BAR_SECONDS

    def __init__(self, title: str, console: Console) -> None:
        super().__init__(title)
        self._console = console

    def _open(self) -> None:
        # late: workers without a terminal need not wait for it
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[files]} files"),
            console=self._console,
            transient=True,
        )
        self._task = self._bar.add_task(self._title, total=self._total, files=0)
        self._bar.start()

    def _show(self) -> None:
        self._bar.update(self._task, completed=self._bytes, total=self._total, files=self._files)

    def _close(self) -> None:
        self._bar.stop()


def progress_for(console: Console, title: str) -> Progress:
    """A bar where `console` is a terminal, else lines in the log."""
    return TerminalBar(title, console) if console.is_terminal else LogLines(title)
