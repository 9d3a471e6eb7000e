"""What the metadata services of the clouds have in common: a notice, and one way to ask over plain HTTP.

Standard library only. A metadata service is link-local: proxies are never used and redirects never followed.
"""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Any, Protocol
from urllib.parse import urlsplit

ADDRESS = "http://169.254.169.254"
CONNECT_SECONDS = 2.0
ANSWER_SECONDS = 3.0
_LARGEST = 1 << 18  # bytes of an answer


@dataclass(frozen=True)
class Notice:
    """A cloud's word that this machine will be, or may be, taken away."""

    kind: str  # "terminate", "stop", "hibernate", "preempt", "reboot", "redeploy", "maintenance", "rebalance"
    source: str  # "ec2", "gcp", "azure"
    deadline: float | None  # on `time.monotonic`'s clock; None: not said
    detail: str  # for people; the same as long as it is the same notice
    certain: bool = True  # False: a warning, to be answered with a save and not with a stop


class Unavailable(Exception):
    """A metadata service that cannot be reached, refuses (`answered`), or says what makes no sense."""

    def __init__(self, why: str, *, answered: bool = False) -> None:
        super().__init__(why)
        self.answered = answered


class Service(Protocol):
    """One cloud's metadata service, asked by one thread."""

    name: str

    def poll(self) -> list[Notice]:
        """Every notice that stands now. May wait a few seconds for one. Raises `Unavailable`."""

    def clock(self, seconds: float = ANSWER_SECONDS) -> float:
        """The service's own time, since the epoch: whether it answers to this process at all, within `seconds`.

        Raises `Unavailable`.
        """

    def close(self) -> None:
        """End a `poll` that is under way in another thread, and all later ones, with `Unavailable`."""


@dataclass(frozen=True)
class Answer:
    """What a metadata service answered. Header names are in lower case."""

    status: int
    text: str
    headers: Mapping[str, str]

    def json(self) -> dict[str, Any]:
        """The JSON object in the body. Raises `Unavailable` where there is none."""
        try:
            value = json.loads(self.text)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise Unavailable(f"{self.text[:60]!r} is no JSON object")
        return value

    @property
    def moment(self) -> float:
        """When it was answered by the service's clock, in seconds since the epoch; by ours where it does not tell."""
        with contextlib.suppress(ValueError, KeyError):
            return parsedate_to_datetime(self.headers["date"]).timestamp()
        return time.time()

    def deadline(self, moment: float) -> float:
        """A moment in seconds since the epoch on our monotonic clock, by the service's own time: ours may be wrong."""
        return time.monotonic() + moment - self.moment


class Endpoint:
    """The address of a metadata service. `close` may be called from any thread, `ask` by one at a time."""

    def __init__(self, url: str) -> None:
        self._url = url if "://" in url else f"http://{url}"
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._closed = False

    def ask(
        self, path: str, headers: Mapping[str, str], *, method: str = "GET", seconds: float = ANSWER_SECONDS
    ) -> Answer:
        """One request over a connection of its own; connecting and answering are bounded. Raises `Unavailable`."""
        connection = self._connection()
        try:
            connection.connect()
            self._take(connection.sock)
            connection.sock.settimeout(seconds)
            ends = time.monotonic() + seconds
            connection.request(method, path, headers=dict(headers))
            response = connection.getresponse()
            text = _read(response, ends)
        except (OSError, HTTPException, ValueError) as error:
            raise Unavailable(f"{self._url}{path.partition('?')[0]}: {error or type(error).__name__}") from None
        finally:
            self._socket = None
            connection.close()
        return Answer(response.status, text, {name.lower(): value for name, value in response.getheaders()})

    def _connection(self) -> HTTPConnection:
        try:
            parts = urlsplit(self._url)
            if parts.scheme == "http" and parts.hostname:
                return HTTPConnection(parts.hostname, parts.port or 80, timeout=CONNECT_SECONDS)
        except ValueError:
            pass
        raise Unavailable(f"{self._url!r} is no address of a metadata service")

    def _take(self, connected: socket.socket) -> None:
        with self._lock:
            if self._closed:
                raise Unavailable("closed")
            self._socket = connected

    def close(self) -> None:
        """End an `ask` that waits for its answer, and all later ones, with `Unavailable`."""
        with self._lock:
            self._closed = True
            if (connected := self._socket) is not None:
                with contextlib.suppress(OSError):
                    connected.shutdown(socket.SHUT_RDWR)


def _read(response: HTTPResponse, ends: float) -> str:
    """The body. A socket's time-out is for each packet: one that drips is bounded by `ends`."""
    body = b""
    while piece := response.read1(1 << 14):
        body += piece
        if len(body) > _LARGEST or time.monotonic() > ends:
            raise ValueError("the answer does not end")
    return body.decode("utf-8", "replace").strip()
