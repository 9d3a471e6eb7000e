"""A TCP proxy that makes every byte take a while, in a process of its own: `delay.py TARGET_PORT MILLISECONDS`.

Half of the time each way, and a round trip more for a new connection, as a handshake would cost. Says its port.
"""

import asyncio
import sys
from collections.abc import Callable
from typing import cast

# bytes on their way in one direction of one connection before its sender has to wait
_IN_FLIGHT = 64 << 20


class Half(asyncio.Protocol):
    """One end of a connection: what it receives is written to the other end after the delay."""

    def __init__(self, seconds: float, extra: float, ready: asyncio.Future[asyncio.Transport]) -> None:
        self._loop = asyncio.get_running_loop()
        self._seconds = seconds
        self._due = self._loop.time() + seconds + extra
        self._peer = ready
        self._in_flight = 0
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._in_flight += len(data)
        if self._in_flight > _IN_FLIGHT:
            self.transport.pause_reading()
        self._later(lambda: self._pass_on(data))

    def connection_lost(self, error: Exception | None) -> None:
        self._later(self._end)

    def _later(self, action: Callable[[], None]) -> None:
        # after what came earlier (timers of one moment run in any order); the first bytes are as late as a handshake
        self._due = max(self._due + 1e-6, self._loop.time() + self._seconds)
        self._loop.call_at(self._due, action)

    def _pass_on(self, data: bytes) -> None:
        self._in_flight -= len(data)
        if self._in_flight <= _IN_FLIGHT and not self.transport.is_closing():
            self.transport.resume_reading()
        if not self._peer.done():
            self._peer.add_done_callback(lambda peer: peer.result().write(data))
        elif not self._peer.result().is_closing():
            self._peer.result().write(data)

    def _end(self) -> None:
        if self._peer.done():
            self._peer.result().close()
        else:
            self._peer.add_done_callback(lambda peer: peer.result().close())


class Front(Half):
    """The end that clients connect to; opens the other one."""

    def __init__(self, port: int, seconds: float) -> None:
        self._port = port
        super().__init__(seconds, 2 * seconds, asyncio.get_running_loop().create_future())

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._opening = self._loop.create_task(self._open())

    async def _open(self) -> None:
        mine: asyncio.Future[asyncio.Transport] = self._loop.create_future()
        mine.set_result(self.transport)
        transport, _ = await self._loop.create_connection(lambda: Half(self._seconds, 0, mine), "127.0.0.1", self._port)
        self._peer.set_result(transport)


async def main() -> None:
    port, milliseconds = int(sys.argv[1]), float(sys.argv[2])
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Front(port, milliseconds / 2000), "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
