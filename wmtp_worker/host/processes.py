"""Several processes of one command on this machine, as `torchrun` would start them, but with our exit codes.

torchrun ends with 1 whatever its workers end with, starts them again whatever was wrong, and kills them 30 seconds
after a signal, in the middle of a save. For several machines it is the right tool all the same: workers do not care
who started them. Standard library only.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from wmtp_worker import errors
from wmtp_worker.host.stop import StopRequest

PARENT = "LAUNCHER_PID"
_TICK = 0.1  # seconds
# for the others, once one has failed: they notice when they next wait for it, and may have something to save
_GRACE_SECONDS = 60.0
# what says most about why a run ended, first
_TELLING = (errors.WRONG, errors.BUG, errors.HELD, errors.NOT_SAFE, errors.AGAIN)


def visible_gpus() -> int:
    """How many GPUs torch would use. Without a driver torch is not imported for that."""
    drivers = (*Path("/dev").glob("nvidia[0-9]*"), *(Path(path) for path in ("/dev/kfd", "/dev/dxg")))
    if not any(path.exists() for path in drivers):
        return 0
    import torch

    return torch.cuda.device_count()


def share_gpus(gpus: int, passes: int, shards: int | Literal["auto"]) -> int:
    """As many processes as there are GPUs, or the most that share `passes` micro-batches of a step, and copies of the
    model in `shards`, evenly. Where no number does, that of the GPUs: the processes say what is wrong.
    """
    multiple = 1 if shards == "auto" else shards
    fitting = [count for count in range(1, gpus + 1) if passes % count == 0 and count % multiple == 0]
    return max(fitting, default=max(gpus, 1))


def run_processes(
    command: Sequence[str], count: int, stop: StopRequest, restarts: int, on_restart: Sequence[str] = ()
) -> int:
    """Run `command` as ranks 0 to `count` - 1 of one group and return the exit code that says most.

    Where one dies by a signal, all are started again, at most `restarts` times, with `on_restart` added to the command.
    A signal to us is passed on once; a second one ends us at once, and they follow. They never outlive this process.
    """
    while True:
        codes = _Processes(command, count).wait(stop)
        died = {rank: -code for rank, code in enumerate(codes) if code < 0}
        if not died or stop.requested:
            return _exit_code(codes)
        names = ", ".join(f"process {rank} by {signal.Signals(number).name}" for rank, number in died.items())
        if not restarts:
            _say(f"died: {names}; not started again: parallel.restarts is used up")
            return _exit_code(codes)
        restarts -= 1
        _say(f"died: {names}; starting all {count} again, {restarts} times more at most")
        command = [*command, *on_restart]
        on_restart = ()


def _exit_code(codes: Iterable[int]) -> int:
    found = {errors.AGAIN if code < 0 else code for code in codes} - {errors.DONE}
    return next((code for code in _TELLING if code in found), max(found, default=errors.DONE))


class _Processes:
    def __init__(self, command: Sequence[str], count: int) -> None:
        variables = {
            "WORLD_SIZE": count,
            "LOCAL_WORLD_SIZE": count,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": _free_port(),
            PARENT: os.getpid(),
        }
        # torch's own words about a rank that is gone are pages of C++ frames
        quiet = {"TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")}
        common = {**os.environ, **quiet, **{name: str(value) for name, value in variables.items()}}
        self._all: list[subprocess.Popen[bytes]] = []
        self._killed: set[int] = set()
        try:
            for rank in range(count):
                own = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                # a group of their own: Ctrl-C reaches them through us alone, not twice
                self._all.append(subprocess.Popen(list(command), env=own, process_group=0))
        except BaseException:
            self._kill()
            raise

    def wait(self, stop: StopRequest) -> list[int]:
        """Until all have ended: their exit codes, -number for a signal that was not ours."""
        told, deadline = False, None
        try:
            while any(process.poll() is None for process in self._all):
                if stop.requested and not told:
                    self._pass_on(stop.reason)
                    told = True
                if deadline is None and self._is_broken():
                    deadline = time.monotonic() + _GRACE_SECONDS
                if deadline is not None and time.monotonic() > deadline:
                    self._kill()
                time.sleep(_TICK)
        finally:
            self._kill()
        return [errors.AGAIN if rank in self._killed else process.returncode for rank, process in enumerate(self._all)]

    def _is_broken(self) -> bool:
        """Whether the others cannot go on: rank 0 ends last, and any other ends alone only where something is wrong."""
        codes = [process.poll() for process in self._all]
        return codes[0] is not None or any(code not in (None, errors.DONE, errors.AGAIN) for code in codes)

    def _pass_on(self, reason: str | None) -> None:
        number = getattr(signal, reason or "", signal.SIGTERM)
        for process in self._all:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    def _kill(self) -> None:
        for rank, process in enumerate(self._all):
            if process.poll() is None:
                self._killed.add(rank)
                process.kill()
                process.wait()


def end_with_parent() -> None:
    """In a process that `run_processes` started: end at once when that is gone, as if it were one process."""
    parent = os.environ.get(PARENT)
    if not parent or not parent.isdecimal():
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(0.5)
        os._exit(errors.AGAIN)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _say(line: str) -> None:
    with contextlib.suppress(OSError):
        sys.stderr.write(f"wmtp: {line}\n")
        sys.stderr.flush()
