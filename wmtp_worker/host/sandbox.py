"""Runs code that nobody has read, a model's or a data set's, against its tests.

Nothing of the worker is within its reach: no environment, no network, no file but Python's own, no other process, and
only so much time and memory. How: `sandbox_confine`; what follows what: `sandbox_process`; why it cannot decide its
own verdict: `sandbox_judge`.
"""

import contextlib
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import wmtp_worker
from wmtp_worker.errors import InputError, printable
from wmtp_worker.host.limits import cpu_limit
from wmtp_worker.host.sandbox_confine import ALL
from wmtp_worker.host.sandbox_judge import OTHER_OUTPUT, receive, send

Status = Literal["passed", "failed", "timeout", "error"]

_START = (
    "import sys; sys.path.insert(0, sys.argv[1]); from wmtp_worker.host.sandbox_process import main; "
    "del sys.path[0]; main()"
)
# how a set is ordered must not depend on chance: the same code gets the same verdict
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}
_AHEAD = 4  # items per worker that are prepared before their turn
_POLL = 0.2
_SLACK = 30.0

Item = TypeVar("Item")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Limits:
    """For one process: a program under assertions and its judge have them each, a program with input for each test."""

    cpu_seconds: int = 10
    wall_seconds: float = 60.0  # a machine that others use too must not make right programs wrong
    memory: int = 1 << 30  # bytes of address space
    output: int = 16 << 20  # bytes printed


@dataclass(frozen=True)
class Exchange:
    """A test of a program that reads and prints."""

    input: str
    output: str


@dataclass(frozen=True)
class Job:
    """A Python program and its tests: either assertions that call it (`setup` runs before them), or exchanges."""

    code: str
    tests: tuple[str, ...] = ()
    setup: str = ""
    exchanges: tuple[Exchange, ...] = ()


@dataclass(frozen=True)
class Result:
    """passed: every test. failed: one was not, or the program ended. timeout: CPU or wall time. error: undecided.

    Undecided are programs that need what the sandbox has not (another package, files, the network), and tests that
    cannot be run or compare what only the program could compare.
    """

    status: Status
    detail: str
    cpu_seconds: float
    means: tuple[str, ...]

    @property
    def wrong_answer(self) -> bool:
        """Whether it failed by what it answered, and not by an exception or by ending."""
        by_answer = self.detail.startswith("AssertionError") or self.detail.endswith(OTHER_OUTPUT)
        return self.status == "failed" and by_answer


class Sandbox:
    """A context manager that holds `workers` processes ready; `run` may be called from any thread.

    `weak`: run even where the kernel does not offer enough to keep code from secrets, network or other processes;
    without it that raises `InputError` before any code is run. `means`: those of `sandbox_confine.ALL` to try.
    """

    def __init__(
        self,
        workers: int = 0,
        limits: Limits | None = None,
        *,
        weak: bool = False,
        means: tuple[str, ...] = ALL,
    ) -> None:
        self.workers = workers or max(1, math.floor(cpu_limit()))
        self._limits = limits or Limits()
        self._options = {"weak": weak, "means": list(means)}
        self._idle: queue.SimpleQueue[_Zygote] = queue.SimpleQueue()
        self._all: list[_Zygote] = []

    def __enter__(self) -> Self:
        for _ in range(self.workers):
            zygote = _Zygote()
            self._all.append(zygote)
            self._idle.put(zygote)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def run(self, job: Job, limits: Limits | None = None) -> Result:
        """Wait for a free process, run the job, say how it ended. Raises `InputError`: see the class."""
        zygote = self._idle.get()
        try:
            answer = zygote.run(job, limits or self._limits, self._options)
        finally:
            self._idle.put(zygote)
        if "unconfined" in answer:
            raise InputError(
                f"this machine does not keep strange code from what it must not: {', '.join(answer['unconfined'])}",
                where=f"in force: {', '.join(answer['held']) or 'nothing'}",
                fix="use Linux 5.13 or newer, or the image with Docker's own seccomp profile; or, for code that you "
                "trust, --weak-sandbox",
            )
        detail = printable(" ".join(answer["detail"].split()))  # words of strange code
        return Result(answer["status"], detail, answer["cpu_seconds"], tuple(answer["held"]))

    def map(
        self, function: Callable[[Item], Answer], items: Iterable[Item], poll: Callable[[], None] = lambda: None
    ) -> Iterator[Answer]:
        """`function(item)` in the order of the items, in as many threads as there are workers; it may call `run`.

        `items` is drawn from as the answers are taken. `poll` is called while waiting and may raise to stop; then, and
        when the iterator is closed, whatever runs is ended, and the sandbox with it.
        """
        waiting: deque[Future[Answer]] = deque()

        def first() -> Answer:
            while True:
                poll()
                with contextlib.suppress(TimeoutError):
                    return waiting[0].result(timeout=_POLL)

        with ThreadPoolExecutor(self.workers) as pool:
            try:
                for item in items:
                    waiting.append(pool.submit(function, item))
                    if len(waiting) >= _AHEAD * self.workers:
                        yield first()
                        waiting.popleft()
                while waiting:
                    yield first()
                    waiting.popleft()
            finally:
                if waiting:
                    pool.shutdown(wait=False, cancel_futures=True)
                    self.end()

    def end(self) -> None:
        """End all processes; a job that runs ends with an error."""
        for zygote in self._all:
            zygote.end()


class _Zygote:
    """The process that forks a supervisor for each job; started anew when it was lost."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._ended = False

    def run(self, job: Job, limits: Limits, options: dict[str, Any]) -> dict[str, Any]:
        head: dict[str, Any] = {"code": job.code, **asdict(limits), **options}
        if job.exchanges:
            frames = [head | {"kind": "exchanges", "count": len(job.exchanges)}]
            for one in job.exchanges:
                frames += [{"input": one.input}, {"output": one.output}]
        else:
            frames = [head | {"kind": "asserts"}, {"setup": job.setup, "tests": job.tests}]
        process = self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        # the supervisor keeps the time; this is for a supervisor that is lost
        guard = threading.Timer(limits.wall_seconds * max(1, len(job.exchanges)) + _SLACK, self._kill)
        guard.start()
        try:
            for frame in frames:
                send(process.stdin.fileno(), frame)
            answer: dict[str, Any] = receive(process.stdout.fileno())
        except (EOFError, OSError, ValueError):
            self._kill()
            return {"status": "error", "detail": "the sandbox was lost", "cpu_seconds": 0.0, "held": []}
        finally:
            guard.cancel()
        if "unconfined" in answer:
            self._kill()
        return answer

    def end(self) -> None:
        self._ended = True
        self._kill()
        if self._folder is not None:
            self._folder.cleanup()

    def _start(self) -> "subprocess.Popen[bytes]":
        if self._ended:
            raise RuntimeError("the sandbox is closed")
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="wmtp-sandbox-")
        root = Path(wmtp_worker.__file__).parents[1]
        process = subprocess.Popen(
            [sys.executable, "-P", "-s", "-S", "-B", "-c", _START, str(root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_ENVIRONMENT,
            cwd=self._folder.name,
            bufsize=0,
            start_new_session=True,
        )
        self._process = process
        assert process.stdout is not None
        with contextlib.suppress(EOFError, ValueError):
            if receive(process.stdout.fileno()) == {"ready": True}:
                return process
        self._kill()
        raise InputError(
            "the sandbox's Python does not start", where=sys.executable, fix="wmtp doctor says what is wrong with it"
        )

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # supervisors are in its group; their children die with them
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
