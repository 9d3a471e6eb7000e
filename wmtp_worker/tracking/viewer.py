"""Records that no server has, shown by one on this machine that is made for it: `mlflow ui` on loopback."""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

from wmtp_worker.errors import SettingsError, TransientError
from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.tracking.record import Status, TrackedRun
from wmtp_worker.tracking.sender import Order, start
from wmtp_worker.tracking.server import PUSHED, upload_seconds

_START_SECONDS = 300.0


def find_program(given: str | None) -> list[str]:
    """The command that is MLflow with its server: the one given, this environment's, or by `uvx`.

    Raises `SettingsError` where there is none: a worker has only the part of MLflow that logs.
    """
    if given is not None:
        if found := shutil.which(given):
            return [found]
        raise SettingsError(f"there is no program {given!r}", where="--mlflow", fix="give the path of mlflow")
    if all(importlib.util.find_spec(name) for name in ("flask", "sqlalchemy", "alembic", "pandas")):
        return [sys.executable, "-m", "mlflow"]
    release = version("mlflow-skinny")
    if uvx := shutil.which("uvx"):
        return [uvx, "--from", f"mlflow=={release}", "mlflow"]
    raise SettingsError(
        "MLflow's server is not here: a worker has only the part that logs",
        fix=f"pip install mlflow=={release} into any environment, and name its program: --mlflow PATH/bin/mlflow; "
        "or install uv, which does that by itself",
    )


@contextmanager
def server(program: list[str], folder: Path, port: int, check: Callable[[], None]) -> Iterator[str]:
    """`mlflow server` on loopback with its database in `folder`, which is kept; its address.

    Raises `SettingsError` where the port is taken, and `TransientError` where it does not start. `check` is polled
    meanwhile and may raise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = _free(port)
    address = f"http://127.0.0.1:{port}"
    command = [*program, "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        f"{folder}/artifacts",
    ]
    environ = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_TRACKING", "PYTHON"))}
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=ours | environ, start_new_session=True
        )
    try:
        _wait(process, address, folder / "server.log", check)
        yield address
    finally:
        with suppress(ProcessLookupError):  # nobody is left of them
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _free(port: int) -> int:
    """The port, or for 0 any, if nobody listens there: another server there would be taken for ours."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server itself: what has ended is no matter
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            words = f"port {port} of this machine cannot be had: {error.strerror}"
            raise SettingsError(words, where="--port", fix="--port 0 takes one that is free") from None
        return int(probe.getsockname()[1])


def _wait(process: "subprocess.Popen[bytes]", address: str, log: Path, check: Callable[[], None]) -> None:
    until = time.monotonic() + _START_SECONDS
    while True:
        check()
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                answered = True
        except (urllib.error.URLError, OSError):
            answered = False
        if process.poll() is not None or time.monotonic() > until:
            words = log.read_text(errors="replace").strip().splitlines() or ["without a word"]
            raise TransientError(f"MLflow's server does not start: {words[-1]}", where=str(log))
        if answered:
            return
        time.sleep(0.2)


def records(root: Path) -> list[RunPaths]:
    """The runs below a work directory (or a copy of a bucket) that have a record."""
    found = (RunPaths(root, path.parent.name) for path in sorted((root / "mlflow").glob("*/run.json")))
    return [paths for paths in found if TrackedRun.load(paths.tracking_record) is not None]


def push(paths: RunPaths, uri: str, *, seconds: float, viewer: bool = False) -> tuple[bool, list[str]]:
    """Send all of a run's record, and how it ended, to a server; whether that has all of it now, and what was said.

    To be called while nobody trains the run, unless it is for a `viewer` of one's own.
    """
    record = TrackedRun.load(paths.tracking_record)
    assert record is not None
    order = Order(uri, str(paths.workdir), paths.run, f"{PUSHED}{os.getpid()}", viewer=viewer)
    process = start(order)
    # one that has no end was killed, and its sender with it
    status: Status = "KILLED" if record.status == "RUNNING" and not viewer else record.status
    try:
        # what is on its way when the time is over arrives: a model takes long
        last = upload_seconds(paths.best.stat().st_size if paths.best.exists() else 0)
        out, _ = process.communicate(order.end(status, seconds), timeout=seconds + 30 + 2 * last)
    except subprocess.TimeoutExpired:
        process.kill()
        out, _ = process.communicate()
    said = [line.partition("\t")[::2] for line in out.decode(errors="replace").splitlines()]
    return process.returncode == 0, [message for level, message in said if level in ("info", "warning")]
