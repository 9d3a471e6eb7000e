"""Commands on one machine: this one, or (`ssh.py`) another. What they are given on stdin is in no list of processes."""

import asyncio
import contextlib
import shutil
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from wmtp_worker.errors import HostError, SettingsError, WorkerError

_POLL = 0.2  # seconds
_CHUNK = 1 << 16
_LAST_WORDS = 1 << 14  # bytes that are kept of a stream's errors
T = TypeVar("T")


@dataclass(frozen=True)
class Done:
    """What a command ended with, and said."""

    code: int
    out: str
    err: str


class Writer(Protocol):
    def write(self, data: bytes, /) -> None: ...
    def write_eof(self) -> None: ...


class Reader(Protocol):
    async def read(self, n: int = -1, /) -> bytes: ...


@dataclass(frozen=True)
class Process:
    """A command that runs, with its three streams."""

    stdin: Writer
    stdout: Reader
    stderr: Reader
    wait: Callable[[], Coroutine[Any, Any, int]]


class Shell(ABC):
    """Where commands run; `where` names it for people. `check` is polled while they do, and may raise."""

    where: str

    def __init__(self, check: Callable[[], None] = lambda: None) -> None:
        self._check = check

    @abstractmethod
    def _open(self, command: Sequence[str]) -> AbstractAsyncContextManager[Process]:
        """Start a command. Raises `HostError` where the machine cannot be reached."""

    def run(self, command: Sequence[str], stdin: bytes = b"", timeout: float = 120) -> Done:
        """Run a command to its end. Raises `HostError` if it takes longer than `timeout` seconds."""
        return asyncio.run(self._polled(self._run(command, stdin, timeout)))

    def stream(self, command: Sequence[str], write: Callable[[bytes], None]) -> Done:
        """Run a command and hand on what it says as it comes: `out` is empty, `err` the end of its errors."""
        return asyncio.run(self._polled(self._stream(command, write)))

    async def _run(self, command: Sequence[str], stdin: bytes, timeout: float) -> Done:
        try:
            async with asyncio.timeout(timeout), self._open(command) as process:
                process.stdin.write(stdin)
                process.stdin.write_eof()
                out, err, code = await asyncio.gather(_all(process.stdout), _all(process.stderr), process.wait())
        except TimeoutError as error:
            raise HostError(
                f"no answer in {timeout:g} s", where=self.where, fix="look after the host, try again"
            ) from error
        return Done(code, out.decode(errors="replace"), err.decode(errors="replace"))

    async def _stream(self, command: Sequence[str], write: Callable[[bytes], None]) -> Done:
        try:
            async with self._open(command) as process:
                process.stdin.write_eof()
                # both at once: a pipe that nobody empties would hold the command up
                _, err = await asyncio.gather(_hand_on(process.stdout, write), _end(process.stderr))
                return Done(await process.wait(), "", err.decode(errors="replace"))
        except _Unwritten as error:
            raise error.trouble from None

    async def _polled(self, work: Coroutine[Any, Any, T]) -> T:
        task = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait({task}, timeout=_POLL))[0]:
                self._check()
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, WorkerError):
                    await task


async def _all(reader: Reader) -> bytes:
    parts = []
    while data := await reader.read(_CHUNK):
        parts.append(data)
    return b"".join(parts)


async def _end(reader: Reader) -> bytes:
    end = b""
    while data := await reader.read(_CHUNK):
        end = (end + data)[-_LAST_WORDS:]
    return end


async def _hand_on(reader: Reader, write: Callable[[bytes], None]) -> None:
    while data := await reader.read(_CHUNK):
        try:
            write(data)
        except OSError as error:
            raise _Unwritten(error) from error


class _Unwritten(Exception):
    """A pipe that nobody reads, a full disk: as an `OSError` it would look like the connection's."""

    def __init__(self, trouble: OSError) -> None:
        super().__init__(str(trouble))
        self.trouble = trouble


class LocalShell(Shell):
    """This machine."""

    where = "this machine"

    @contextlib.asynccontextmanager
    async def _open(self, command: Sequence[str]) -> AsyncIterator[Process]:
        program = shutil.which(command[0])
        if program is None:
            raise SettingsError(f"there is no {command[0]} on this machine", where="PATH", fix=f"install {command[0]}")
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(program, *command[1:], stdin=pipe, stdout=pipe, stderr=pipe)
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            yield Process(process.stdin, process.stdout, process.stderr, process.wait)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
