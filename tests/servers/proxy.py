"""A proxy in front of an HTTP server that misbehaves on demand: the faults of a real network, made at will.

    with Proxy("127.0.0.1", port) as proxy:
        client = connect(f"http://127.0.0.1:{proxy.port}")
        proxy.latency_down = 0.05
        proxy.cut("down", after=1000, match="^GET .*large")

A fault belongs to requests whose first line (`GET /bucket/key?query HTTP/1.1`) `match` finds. It is used up when it
takes effect, `times` times. Offsets count the body of a request ("up") or of its answer ("down").
"""

import asyncio
import contextlib
import math
import re
import socket
import struct
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self

from tests.servers.processes import free_ports

Direction = Literal["up", "down"]
_CHUNK = 1 << 18
_HEAD_END = b"\r\n\r\n"
_LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:\s*chunked", re.IGNORECASE)
_LAST_CHUNK = re.compile(rb"(^|\r\n)0\r\n([^\r\n]+\r\n)*\r\n$")
_INTERIM = re.compile(rb"HTTP/1\.[01] 1\d\d ")


@dataclass
class _Fault:
    kind: Literal["cut", "flip", "stall", "lose", "answer", "call"]
    match: re.Pattern[str]
    times: int
    direction: Direction = "down"
    offset: int = 0
    reset: bool = False
    answer: bytes = b""
    call: Callable[[], object] | None = None


@dataclass
class _Break(Exception):
    """Ends a connection, or its usefulness, after `first` has been passed on."""

    first: bytes
    reset: bool = False
    stall: bool = False
    answer: bytes = b""


class Proxy:
    """Listens on `port` of 127.0.0.1 and passes everything on to a server, but for the faults asked for."""

    def __init__(self, host: str, port: int) -> None:
        self.target = (host, port)
        (self.port,) = free_ports(1)  # it is opened again after `refuse`: nothing may take it meanwhile
        # seconds a byte is on its way; a new connection costs one round trip more, as its handshake would
        self.latency_up = 0.0
        self.latency_down = 0.0
        # nothing passes in either direction while this is set
        self.stalled = False
        self.bytes_up = 0
        self.bytes_down = 0
        self.connections = 0
        # first lines of all requests
        self.requests: list[str] = []
        # and the same with their headers
        self.heads: list[str] = []
        # what the server sees of a request's line and headers
        self.rewrite: Callable[[bytes], bytes] = lambda head: head
        self._faults: list[_Fault] = []
        self._lock = threading.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name="proxy", daemon=True)
        self._calls = ThreadPoolExecutor(4, thread_name_prefix="proxy-call")

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    # --- faults ---

    def cut(self, direction: Direction, after: int, *, reset: bool = False, times: int = 1, match: str = "") -> None:
        """End the connection after that many bytes of a body, orderly or (`reset`) with a TCP reset."""
        self._add(_Fault("cut", re.compile(match), times, direction, after, reset))

    def flip(self, direction: Direction, offset: int, *, times: int = 1, match: str = "") -> None:
        """Invert the byte at that offset of a body."""
        self._add(_Fault("flip", re.compile(match), times, direction, offset))

    def stall(self, direction: Direction, after: int, *, times: int = 1, match: str = "") -> None:
        """Pass on nothing more of this connection after that many bytes of a body, but keep it open."""
        self._add(_Fault("stall", re.compile(match), times, direction, after))

    def lose_response(self, *, reset: bool = False, times: int = 1, match: str = "") -> None:
        """Let the request reach the server and end the connection when the answer comes."""
        self._add(_Fault("lose", re.compile(match), times, reset=reset))

    def answer(
        self, status: int, *, body: str | None = None, headers: str = "", times: int = 1, match: str = ""
    ) -> None:
        """Answer requests in the server's place, which never sees them."""
        code = "SlowDown" if status == 503 else "InternalError"
        text = (
            body if body is not None else f"<Error><Code>{code}</Code><Message>by the proxy</Message></Error>"
        ).encode()
        head = f"HTTP/1.1 {status} Proxy\r\nContent-Length: {len(text)}\r\nConnection: close\r\n"
        head += "Content-Type: application/xml\r\n" + headers + "\r\n"
        self._add(_Fault("answer", re.compile(match), times, answer=head.encode() + text))

    def call(self, function: Callable[[], object], *, times: int = 1, match: str = "") -> None:
        """Call a function when a request has come in, before the server sees it."""
        self._add(_Fault("call", re.compile(match), times, call=function))

    def refuse(self) -> None:
        """End all connections and refuse new ones, until `accept`."""
        self._run(self._unlisten())

    def accept(self) -> None:
        """Listen again, on the same port."""
        self._run(self._listen())

    def drop_connections(self) -> None:
        """End all connections that are open now, with a TCP reset."""
        self._run(self._drop())

    def heal(self) -> None:
        """No faults and no latency from now on."""
        with self._lock:
            self._faults.clear()
        self.latency_up = self.latency_down = 0.0
        self.stalled = False

    @property
    def pending(self) -> int:
        """How often faults that were asked for have yet to take effect."""
        with self._lock:
            return sum(fault.times for fault in self._faults)

    # --- life ---

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(60), "the proxy does not start"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(60)
        self._calls.shutdown(cancel_futures=True)
        assert not self._thread.is_alive(), "the proxy does not stop"

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._server: asyncio.Server | None = None
        await self._listen()
        self._ready.set()
        await self._stop.wait()
        await self._unlisten()
        # transports that were aborted close their sockets in the loop's next rounds
        await asyncio.sleep(0.05)

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    async def _listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, limit=_CHUNK, backlog=512)

    async def _unlisten(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        # let what was accepted a moment ago begin, or nobody would end it
        await asyncio.sleep(0.01)
        await self._drop()

    async def _drop(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            # a cancelled handler would be logged as an error
            with contextlib.suppress(asyncio.CancelledError):
                await _Connection(self, reader, writer).run()
        finally:
            self._tasks.discard(task)

    def _add(self, fault: _Fault) -> None:
        with self._lock:
            self._faults.append(fault)

    def _take(
        self, kind: str, request: str, direction: Direction = "down", start: int = 0, end: int = 1
    ) -> _Fault | None:
        """Use up the first fault of that kind which is due within these offsets of this request's body."""
        if not self._faults:
            return None
        with self._lock:
            for fault in self._faults:
                due = fault.direction == direction and start <= fault.offset < end
                if fault.kind == kind and due and fault.match.search(request):
                    fault.times -= 1
                    if fault.times == 0:
                        self._faults.remove(fault)
                    return fault
        return None


@dataclass
class _Exchange:
    """One request and its answer."""

    request: str = ""
    up: int = 0
    down: int = 0
    answered: bool = False
    head: bytearray = field(default_factory=bytearray)


class _Connection:
    def __init__(self, proxy: Proxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.proxy = proxy
        self.reader = reader
        self.writer = writer
        self.exchange = _Exchange()
        self.head = bytearray()
        self.left: float = 0
        self.tail = b""
        self.extra = proxy.latency_up + proxy.latency_down

    async def run(self) -> None:
        """Pass bytes both ways until either side is done or a fault ends it."""
        try:
            server_reader, server_writer = await asyncio.open_connection(*self.proxy.target, limit=_CHUNK)
        except (OSError, asyncio.CancelledError):
            _reset(self.writer)
            return
        pumps = [
            asyncio.create_task(self._pump(self.reader, server_writer, self._up, "up")),
            asyncio.create_task(self._pump(server_reader, self.writer, self._down, "down")),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            _reset(self.writer)
            raise
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            await _end(server_writer, self.writer)

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        inspect: Callable[[bytes], Awaitable[bytes]],
        direction: Direction,
    ) -> None:
        queue: asyncio.Queue[tuple[float, bytes] | None] = asyncio.Queue(64)
        feeder = asyncio.create_task(self._feed(reader, queue, direction))
        clock = asyncio.get_running_loop().time
        try:
            while (item := await queue.get()) is not None:
                due, data = item
                if (wait := due - clock()) > 0:
                    await asyncio.sleep(wait)
                while self.proxy.stalled:
                    await asyncio.sleep(0.02)
                try:
                    await self._send(writer, await inspect(data), direction)
                except _Break as broken:
                    await self._break(broken, writer, direction, queue)
                    return
        except OSError:
            pass
        finally:
            feeder.cancel()

    async def _feed(
        self, reader: asyncio.StreamReader, queue: asyncio.Queue[tuple[float, bytes] | None], direction: Direction
    ) -> None:
        clock = asyncio.get_running_loop().time
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK):
                latency = self.proxy.latency_up if direction == "up" else self.proxy.latency_down
                if direction == "up":
                    latency, self.extra = latency + self.extra, 0.0
                await queue.put((clock() + latency, data))
        await queue.put(None)

    async def _send(self, writer: asyncio.StreamWriter, data: bytes, direction: Direction) -> None:
        if direction == "up":
            self.proxy.bytes_up += len(data)
        else:
            self.proxy.bytes_down += len(data)
        writer.write(data)
        await writer.drain()

    async def _break(
        self,
        broken: _Break,
        writer: asyncio.StreamWriter,
        direction: Direction,
        queue: asyncio.Queue[tuple[float, bytes] | None],
    ) -> None:
        await self._send(writer, broken.first, direction)
        if broken.stall:
            await asyncio.Event().wait()
        if broken.answer:
            await self._send(self.writer, broken.answer, "down")
            # a connection closed before all was read is reset, and the client would not see the answer
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(2):
                    while await queue.get() is not None:
                        pass
        if broken.reset:
            _reset(self.writer)

    async def _up(self, data: bytes) -> bytes:
        out = []
        while data:
            if not self.left:
                self.head += data
                end = self.head.find(_HEAD_END)
                if end < 0:
                    break
                head, data = bytes(self.head[: end + 4]), bytes(self.head[end + 4 :])
                self.head.clear()
                await self._begin(head, b"".join(out))
                out.append(self.proxy.rewrite(head))
                continue
            piece, data = (data, b"") if self.left >= len(data) else (data[: int(self.left)], data[int(self.left) :])
            self.left -= len(piece)
            self.tail = (self.tail + piece[-512:])[-512:]
            if self.left == math.inf and _LAST_CHUNK.search(self.tail):
                self.left = 0
            start = self.exchange.up
            self.exchange.up += len(piece)
            out.append(self._body(piece, "up", start, b"".join(out)))
        return b"".join(out)

    async def _begin(self, head: bytes, before: bytes) -> None:
        line = head.split(b"\r\n", 1)[0].decode("latin-1")
        self.exchange = _Exchange(line)
        self.tail = b""
        length = _LENGTH.search(head)
        self.left = math.inf if _CHUNKED.search(head) else int(length[1]) if length else 0
        self.proxy.requests.append(line)
        self.proxy.heads.append(head.decode("latin-1"))
        if (fault := self.proxy._take("call", line)) and fault.call:
            await asyncio.get_running_loop().run_in_executor(self.proxy._calls, fault.call)
        if fault := self.proxy._take("answer", line):
            raise _Break(before, answer=fault.answer)

    async def _down(self, data: bytes) -> bytes:
        exchange, heads = self.exchange, b""
        while not exchange.answered:
            exchange.head += data
            end = exchange.head.find(_HEAD_END)
            if end < 0:
                return heads
            head, data = bytes(exchange.head[: end + 4]), bytes(exchange.head[end + 4 :])
            exchange.head.clear()
            if not _INTERIM.match(head):
                if fault := self.proxy._take("lose", exchange.request):
                    raise _Break(heads, reset=fault.reset)
                exchange.answered = True
            heads += head
        start = exchange.down
        exchange.down += len(data)
        return heads + self._body(data, "down", start, heads)

    def _body(self, piece: bytes, direction: Direction, start: int, before: bytes) -> bytes:
        end = start + len(piece)
        request = self.exchange.request
        while fault := self.proxy._take("flip", request, direction, start, end):
            place = fault.offset - start
            piece = piece[:place] + bytes([piece[place] ^ 0xFF]) + piece[place + 1 :]
        if fault := self.proxy._take("cut", request, direction, start, end):
            raise _Break(before + piece[: fault.offset - start], reset=fault.reset)
        if fault := self.proxy._take("stall", request, direction, start, end):
            raise _Break(before + piece[: fault.offset - start], stall=True)
        return piece


async def _end(*writers: asyncio.StreamWriter) -> None:
    """Close, but do not wait long for a peer that reads no more."""
    for writer in writers:
        writer.close()
    try:
        async with asyncio.timeout(1):
            for writer in writers:
                with contextlib.suppress(ConnectionError):
                    await writer.wait_closed()
    except TimeoutError:
        pass
    finally:
        for writer in writers:
            writer.transport.abort()


def _reset(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    if connection.fileno() < 0:
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
