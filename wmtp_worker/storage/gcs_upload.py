"""Large uploads to Google Cloud Storage: one resumable session each.

The server keeps what arrives in multiples of 256 KiB and says how much that is, so parts go one after the other. The
last bytes, up to 256 KiB, are held back until `finish`: they are what makes the object visible.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import google_crc32c
from google.api_core.exceptions import from_http_response
from google.auth.transport.requests import AuthorizedSession

from wmtp_worker.errors import IntegrityError, ObjectNotFound, TransientError
from wmtp_worker.storage.gcs_errors import is_damaged
from wmtp_worker.storage.http import TIMEOUT
from wmtp_worker.storage.objects import ObjectInfo

if TYPE_CHECKING:
    from typing_extensions import Buffer

QUANTUM = 256 << 10
_HASHED_AT_ONCE = 1 << 20
_DEAD = (404, 410, 499)
_NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class ResumableUpload:
    """`PartUpload` by a resumable session. `has` and `put` must be called for the parts in ascending order.

    `ObjectNotFound` means that the session is gone, `IntegrityError` that what arrived is not what was sent: begin
    anew, without the token.
    """

    def __init__(
        self,
        session: AuthorizedSession,
        uri: str,
        errors: Callable[[str], AbstractContextManager[str]],
        info: Callable[[Mapping[str, Any]], ObjectInfo],
        *,
        size: int,
        sha256: str,
        part_size: int,
    ) -> None:
        self._session = session
        self._uri = uri
        self._errors = errors
        self._info = info
        self._size = size
        self._sha256 = sha256
        self._part_size = -(-part_size // QUANTUM) * QUANTUM
        self._persisted: int | None = 0  # bytes that the server has; None: to be asked
        self._done: Mapping[str, Any] | None = None
        self._seen = 0  # bytes of the parts given to us so far, and their checksum
        self._crc = 0
        # the last of them, held back; None: the last part has not been given yet
        self._tail: bytes | None = None if size else b""

    @property
    def part_size(self) -> int:
        """A multiple of 256 KiB."""
        return self._part_size

    @property
    def sequential(self) -> bool:
        """A session grows at its end only."""
        return True

    @property
    def token(self) -> Mapping[str, str]:
        """The session's address, with which anybody can write this object, and the content it is for."""
        return {"session": self._uri, "sha256": self._sha256}

    def look(self) -> None:
        """Ask how much the server has. Raises `ObjectNotFound` where the session is gone."""
        with self._errors("continue"):
            self._ask()

    def has(self, number: int, data: Buffer) -> bool:
        """See `PartUpload`. Whether what the server has is the same shows at the end, by the checksum."""
        end = self._see(number, memoryview(data).cast("B"))
        with self._errors("continue"):
            return self._offset() >= end or self._done is not None

    def put(self, number: int, data: Buffer) -> None:
        """See `PartUpload`. After a failure, only what the server has not kept is sent again."""
        view = memoryview(data).cast("B")
        start, end = number * self._part_size, self._see(number, view)
        with self._errors("put part of") as where:
            while (offset := self._offset()) < end and self._done is None:
                if offset < start:
                    raise IntegrityError("the upload lacks a part", where=where, fix="upload the file again")
                self._send(view[offset - start : end - start], f"bytes {offset}-{end - 1}/*")
                if self._offset() <= offset and self._done is None:
                    raise TransientError("the server has kept nothing of what was sent", where=where)

    def finish(self) -> ObjectInfo:
        """See `PartUpload`. The server compares the whole with the checksum of what was given to us."""
        total, crc = self._size, base64.b64encode(self._crc.to_bytes(4, "big")).decode()
        with self._errors("finish") as where:
            offset = self._offset()
            if self._done is None:
                missing = total - offset
                if self._seen != total or self._tail is None or missing > len(self._tail):
                    raise IntegrityError("the upload lacks a part", where=where, fix="upload the file again")
                wanted = f"bytes {offset}-{total - 1}/{total}" if missing else f"bytes */{total}"
                self._send(self._tail[len(self._tail) - missing :], wanted, {"X-Goog-Hash": f"crc32c={crc}"})
            if self._done is None:
                raise TransientError("the server has not kept the end of the upload", where=where)
            # for servers that do not compare by themselves
            if self._done.get("crc32c", crc) != crc:
                raise IntegrityError("what arrived is not what was sent", where=where, fix="upload the file again")
            return self._info(self._done)

    def abort(self) -> None:
        """See `PartUpload`."""
        with self._errors("abort"):
            answer = self._session.delete(self._uri, timeout=TIMEOUT, headers={"Content-Length": "0"})
            if not answer.ok and answer.status_code not in _DEAD:
                raise from_http_response(answer)

    def _see(self, number: int, view: memoryview) -> int:
        """Count a part into the checksum, hold back its tail if it is the last; where the rest of it ends."""
        start = number * self._part_size
        end = start + view.nbytes
        if start > self._seen:
            raise ValueError(f"part {number} before the ones that precede it")
        if end > self._seen:
            for offset in range(0, view.nbytes, _HASHED_AT_ONCE):
                # it takes immutable bytes only
                self._crc = google_crc32c.extend(self._crc, bytes(view[offset : offset + _HASHED_AT_ONCE]))
            self._seen = end
        if end < self._size and view.nbytes == self._part_size:
            return end
        until = max(0, end - 1) // QUANTUM * QUANTUM
        self._tail = bytes(view[until - start :])
        return until

    def _offset(self) -> int:
        if self._persisted is None:
            self._ask()
        return self._persisted or 0

    def _ask(self) -> None:
        self._send(b"", "bytes */*")

    def _send(self, body: Buffer, content_range: str, headers: Mapping[str, str] = _NO_HEADERS) -> None:
        """One request to the session; notes what the server has afterwards, and the object if that made it whole."""
        self._persisted = None
        answer = self._session.put(
            self._uri,
            data=body,
            headers={"Content-Range": content_range, "Content-Length": str(memoryview(body).nbytes), **headers},
            timeout=TIMEOUT,
            allow_redirects=False,  # 308 means something else here
        )
        if answer.status_code == 308:
            persisted = re.fullmatch(r"bytes=0-(\d+)", answer.headers.get("Range", ""))
            self._persisted = int(persisted[1]) + 1 if persisted else 0
        elif answer.ok:
            self._done = answer.json()
            self._persisted = int(self._done["size"])
        elif answer.status_code in _DEAD:
            raise ObjectNotFound("the unfinished upload is gone")
        else:
            error = from_http_response(answer)
            if is_damaged(error):
                raise IntegrityError("what arrived is not what was sent", fix="upload the file again")
            raise error
