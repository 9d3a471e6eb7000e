"""One worker a run on this machine: an advisory lock that dies with its process, however that dies."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wmtp_worker.errors import RunHeldError
from wmtp_worker.storage.atomic import disk_errors


@contextmanager
def run_lock(path: Path) -> Iterator[None]:
    """Hold `path` exclusively. Raises `RunHeldError` at once where another process does; names it."""
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        with disk_errors(path.parent):
            _take(descriptor, path)
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "an unknown process"
        raise RunHeldError(
            f"the run is already being trained by {holder}",
            where=str(path),
            fix="wait for it, stop it, or choose another --run-name",
        ) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
