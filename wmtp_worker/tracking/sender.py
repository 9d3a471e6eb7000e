"""The process beside the training that sends a run's record to an MLflow server.

    python -m wmtp_worker.tracking.sender

A process and not a thread: importing MLflow takes two seconds of the interpreter, and who is killed cannot tell a
server so. The files that the worker writes anyway are the spool; this only reads them, so an outage costs nothing but
time, and what one process did not send, the next one does. It is told what to do by JSON lines on its standard input,
the first one an `Order`; `{"end": "FINISHED", "seconds": 30}` sends what is left and ends, `{"end": null}` ends without
a word to the server. Where the input ends without that, the worker was killed, and that is what the server is told.

It prints lines `level<TAB>message` for the worker to log, and `sent<TAB>` when everything has arrived.
"""

import contextlib
import fcntl
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import wmtp_worker
from wmtp_worker.errors import RunHeldError, WorkerError
from wmtp_worker.redact import redact
from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.tracking.artifacts import Artifacts
from wmtp_worker.tracking.record import Status, TrackedRun, read_servers, write_server
from wmtp_worker.tracking.rows import Row, rows_of
from wmtp_worker.tracking.server import ServerRun, make_client

INTERVAL = 2.0  # seconds between looks at the files
LONGEST_WAIT = 30.0  # seconds between attempts while a server is away
KILLED_SECONDS = 20.0  # to send what a killed worker left
_LOOK_AFTER = 10.0  # seconds after which somebody else may own the run
_NICE = 15
_LINES = 2000  # of the spool at once, so that one that is long needs little memory


@dataclass(frozen=True)
class Order:
    """What a sender is to send, and where."""

    uri: str
    workdir: str
    run: str
    process: str  # who owns the run from now on
    viewer: bool = False  # the server is one that somebody started to look at the run, and not the run's own

    def line(self) -> bytes:
        return (json.dumps(asdict(self)) + "\n").encode()

    @staticmethod
    def end(status: Status | None, seconds: float) -> bytes:
        """What the sender is told at last; None: nothing about how it ended."""
        return (json.dumps({"end": status, "seconds": seconds}) + "\n").encode()


def start(order: Order) -> "subprocess.Popen[bytes]":
    """The sender's process, told what to send. Raises `OSError`."""
    package = Path(wmtp_worker.__file__).parent.parent
    path = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        # -P: a folder `mlflow` where the worker was started is not the package
        [sys.executable, "-P", "-m", "wmtp_worker.tracking.sender"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,  # Ctrl-C is the worker's
    )
    assert process.stdin is not None
    process.stdin.write(order.line())
    process.stdin.flush()
    return process


class Tail:
    """Reads the whole lines of a file as they come."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def rewind(self) -> None:
        """Begin at the first line again."""
        self._offset = 0

    def rows(self) -> Iterator[list[Row]]:
        """What was not read yet, some at once; those that were given count as read when the next are asked for."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                while lines := _whole(file):
                    yield [row for line in lines for row in _rows(line)]
                    self._offset += sum(map(len, lines))
        except FileNotFoundError:
            return


def _whole(file: IO[bytes]) -> list[bytes]:
    lines: list[bytes] = []
    while len(lines) < _LINES and (line := file.readline()).endswith(b"\n"):
        lines.append(line)
    return lines


def _rows(line: bytes) -> list[Row]:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError):
        return []
    return rows_of(document) if isinstance(document, dict) else []


class Sender:
    """Sends until it is told to end, or its input ends."""

    def __init__(self, order: Order, inbox: "queue.Queue[str | None]") -> None:
        self._order = order
        self._inbox = inbox
        self._paths = paths = RunPaths(Path(order.workdir), order.run)
        self._tails = [Tail(paths.metrics), Tail(paths.system)]
        self._server: ServerRun | None = None
        self._taken: dict[str, int] = {}  # metric -> the last step that a server has confirmed
        self._looked = 0.0
        self._failures = 0
        self._status: Status | None = None
        self._left = False  # somebody else has the run
        self._deadline: float | None = None
        self._artifacts = Artifacts(paths)

    def work(self) -> bool:
        """Whether everything was sent in time."""
        while True:
            told = self._status  # what is read after the end was told is all there will be
            try:
                whole = self._send()
                self._failures = 0
                if told is not None:
                    return self._finish(told) and whole
            except RunHeldError as error:
                say("warning", f"nothing more is sent to the MLflow server: {error}")
                return not self._order.viewer  # the other one sends the rest
            except Exception as error:  # MLflow raises whatever its libraries do; none of it ends the sending
                self._failed(error)
            if self._left:
                return True
            if self._late:
                return False
            if told is self._status:
                self._wait()

    @property
    def _late(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _send(self) -> bool:
        """Send what the files have; whether that is all of it, or time was up before."""
        server = self._server
        if server is None:
            server, self._looked = self._connect(), time.monotonic()
        elif self._status is not None or time.monotonic() - self._looked > _LOOK_AFTER:
            server.look()  # at the end, too: the status and the last rows are another's to tell then
            self._looked = time.monotonic()
        self._server = server
        begun = False
        for tail in self._tails:
            for rows in tail.rows():
                if self._left or (begun and self._late):
                    return False
                server.send(rows)
                begun = True
                self._heed()
        if self._status is None and self._artifacts.due:
            self._artifacts.sync(server)
        return True

    def _connect(self) -> ServerRun:
        """Find the run, and go on; from the first line where the server lacks what it had. What it has is left out."""
        path, order = self._paths.tracking_servers, self._order
        record = TrackedRun.load(self._paths.tracking_record)
        if record is None:
            raise FileNotFoundError(self._paths.tracking_record)
        known = read_servers(path).get(order.uri, {})
        run_id = known.get("run_id") if known.get("key") == record.key else None
        server = ServerRun(make_client(order.uri), record, order.process, run_id)
        server.open(take_over=not order.viewer)
        if run_id != server.run_id and not order.viewer:
            facts = {"key": record.key, "run_id": server.run_id, "experiment_id": server.experiment_id}
            try:
                write_server(path, order.uri, facts)
            except WorkerError as error:  # the run is found by its key, too
                say("warning", f"this disk does not remember the run's name at the server: {error}")
            say("info", f"MLflow run {server.run_id} of {record.experiment} at {order.uri}")
        if any(server.marks.get(key, -1) < step for key, step in self._taken.items()):
            for tail in self._tails:
                tail.rewind()
        return server

    def _finish(self, status: Status) -> bool:
        """How it ended first: large files may take longer than there is time. Whether they arrived, too."""
        assert self._server is not None
        assert self._deadline is not None
        self._server.end(status, time.time())
        record = TrackedRun.load(self._paths.tracking_record)
        best = record.best_model if record and status == "FINISHED" and not self._order.viewer else "link"
        try:
            self._artifacts.sync(self._server, best, self._deadline)
        except Exception as error:
            say("warning", f"not all files of the run are at the MLflow server: {_words(error)}")
            return False
        return True

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        if self._server is not None:
            self._taken, self._server = self._server.marks, None  # asks anew how far the server is
        level = "warning" if self._failures == 1 else "debug"
        say(level, f"the MLflow server does not take the record, which waits in the work directory: {_words(error)}")

    def _wait(self) -> None:
        """Until there is something to do: the next look, or what the worker says."""
        seconds = INTERVAL
        if self._failures:
            seconds = min(LONGEST_WAIT, INTERVAL * 2.0 ** (self._failures - 1))
        if self._deadline is not None:
            seconds = min(seconds, 1.0, max(0.0, self._deadline - time.monotonic()))
        self._heed(seconds)

    def _heed(self, seconds: float = 0.0) -> None:
        """What the worker says, if it says something in this time."""
        try:
            line = self._inbox.get(timeout=seconds) if seconds else self._inbox.get_nowait()
        except queue.Empty:
            return
        if self._deadline is not None:
            time.sleep(min(seconds, 0.5))  # nothing that comes after the end counts
        elif line is None:
            self._status, self._deadline = "KILLED", time.monotonic() + KILLED_SECONDS
        else:
            told = json.loads(line)
            self._status, self._left = told["end"], told["end"] is None
            self._deadline = time.monotonic() + told.get("seconds", 0.0)


def say(level: str, message: str) -> None:
    try:
        print(f"{level}\t{redact(message)}".replace("\n", " "), flush=True)
    except OSError:  # the worker is gone, and nobody reads it
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def _words(error: Exception) -> str:
    """The first line of what it says: MLflow quotes whole pages of HTML."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:500]


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Wait until the sender of the process before has ended; it soon does."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the worker is told, and tells us
    os.nice(_NICE)
    order = Order(**json.loads(sys.stdin.readline()))
    inbox: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            inbox.put(line)
        inbox.put(None)

    threading.Thread(target=read, name="orders", daemon=True).start()
    lock = RunPaths(Path(order.workdir), order.run).tracking_lock
    with contextlib.nullcontext() if order.viewer else _lock(lock):
        done = Sender(order, inbox).work()
    if done:
        say("sent", "")
    return 0 if done else 75


if __name__ == "__main__":
    sys.exit(main())
