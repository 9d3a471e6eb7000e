"""The tracking of one process of a run: its record in the work directory, and the sender beside it."""

import contextlib
import logging
import os
import secrets
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import IO, Self

from wmtp_worker.errors import Interrupted, NotSafeError, RunHeldError, WorkerError
from wmtp_worker.host.stop import STOP
from wmtp_worker.settings.schema import TrackingSettings
from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.tracking.record import Status, TrackedRun, read_servers
from wmtp_worker.tracking.sender import Order, start
from wmtp_worker.tracking.system import Measure, SystemSampler

log = logging.getLogger(__name__)

_KILL_SECONDS = 5.0
_SLICE = 0.2  # seconds between looks for a request to stop
_STOP_SECONDS = 6.0  # where nobody said how long a stopped process may live: docker's ten, the save among them


class Tracking:
    """A context manager around the training. Nothing in it waits for a server, and nothing raises because of one.

    Entering writes the record and starts the sender, where there is a server; leaving tells it how the run ended:
    FINISHED, FAILED, or KILLED where something outside stopped it, and waits `tracking.close_seconds` at most until
    all has arrived. What has not stays in the work directory: the next process of the run, or `wmtp tracking push`,
    sends it. The numbers themselves go into `metrics.jsonl` (`MetricsLog`), which the sender reads.
    """

    def __init__(
        self,
        settings: TrackingSettings,
        paths: RunPaths,
        record: TrackedRun,
        *,
        start: int = 0,
        resume: str | int = "auto",
        seconds_left: Callable[[], float | None] = lambda: None,
        stopping: Callable[[], bool] = lambda: STOP.requested,
        measure: Measure = dict,
    ) -> None:
        """`record` describes the run as it is now, `start` is the step it goes on from, as `run.resume` asked.

        `seconds_left` says how long this process may still live, None where nobody said; `stopping`, whether somebody
        asked it to end. `measure`: numbers of the run that stand beside those of the machine.
        """
        self._settings = settings
        self._paths = paths
        self._seconds_left = seconds_left
        self._stopping = stopping
        earlier = TrackedRun.load(paths.tracking_record)
        self.record = record if earlier is None else earlier.continued_by(record, start, resume)
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._arrived = False
        self._run_id: str | None = None
        self._sampler = SystemSampler(paths.system, self.record.created, settings.system_seconds, measure)

    @property
    def run_id(self) -> str | None:
        """What the server calls the run, once that is known."""
        if self._run_id is None and self._settings.uri is not None:
            known = read_servers(self._paths.tracking_servers).get(self._settings.uri, {})
            if known.get("key") == self.record.key:
                self._run_id = known.get("run_id")
        return self._run_id

    def __enter__(self) -> Self:
        self.mark("RUNNING")
        self._sampler.start()
        if self._settings.uri is not None:
            self._start(self._settings.uri)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sampler.stop()
        if isinstance(error, RunHeldError):
            self._end(None, 0.0)  # how it goes on is for who holds it to tell
            return
        status: Status = "FINISHED"
        if isinstance(error, Interrupted | KeyboardInterrupt):
            status = "KILLED"
        elif error is not None and not isinstance(error, NotSafeError):
            status = "FAILED"
        self.mark(status)
        self._end(status, self._settings.close_seconds)

    def mark(self, status: Status) -> None:
        """Write into the record how the run ends, or that it runs: before the bucket gets it for the last time."""
        self.record = self.record.model_copy(
            update={"status": status, "ended": None if status == "RUNNING" else time.time()}
        )
        try:
            self.record.write(self._paths.tracking_record)
        except WorkerError as error:
            log.warning("the record of the run is not written: %s", error)

    # --- the sender ------------------------------------------------------------------------------------------

    def _start(self, uri: str) -> None:
        process = f"{socket.gethostname()}/{os.getpid()}/{secrets.token_hex(4)}"
        order = Order(uri, str(self._paths.workdir), self._paths.run, process)
        try:
            self._process = start(order)
        except OSError as error:
            log.warning("nothing is sent to the MLflow server: its sender does not start: %s", error)
            return
        assert self._process.stdout is not None
        self._reader = threading.Thread(target=self._relay, args=(self._process.stdout,), name="tracking", daemon=True)
        self._reader.start()

    def _relay(self, stream: IO[bytes]) -> None:
        """Log what the sender says, until it has ended."""
        with stream:
            for line in stream:
                level, tab, message = line.decode(errors="replace").rstrip("\n").partition("\t")
                if tab and level == "sent":
                    self._arrived = True
                elif tab and level in ("debug", "info", "warning"):
                    log.log(logging.getLevelNamesMapping()[level.upper()], "%s", message)
                else:
                    log.debug("sender: %s", line.decode(errors="replace").rstrip())

    def _stop_seconds(self) -> float:
        """How long this may last in all, once somebody asked the process to end."""
        left = self._seconds_left()
        return _STOP_SECONDS if left is None else max(1.0, left)

    def _end(self, status: Status | None, seconds: float) -> None:
        process = self._process
        if process is None:
            return
        end = time.monotonic() + seconds + min(_KILL_SECONDS, max(1.0, seconds))
        if status == "KILLED" or self._stopping():
            limit = self._stop_seconds()
            end = min(end, time.monotonic() + limit)
            seconds = min(seconds, max(limit / 2, limit - _KILL_SECONDS))
        assert process.stdin is not None
        try:
            process.stdin.write(Order.end(status, seconds))
            process.stdin.close()
        except OSError:
            pass  # it has died
        while process.poll() is None and time.monotonic() < end:
            if self._stopping():  # however the run ended: the host kills what stays
                end = min(end, time.monotonic() + self._stop_seconds())
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_SLICE)
        if process.poll() is None:
            process.kill()
            process.wait()
        if self._reader is not None:
            self._reader.join(_KILL_SECONDS)
        if status is not None and not self._arrived:
            log.warning(
                "not all of the record is at %s; it is in the work directory: wmtp tracking push %s",
                self._settings.uri,
                self._paths.run,
            )
