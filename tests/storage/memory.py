"""A bucket in memory, with a clock of its own: the quickest server of all, and one that a test can look into."""

import hashlib
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta

from wmtp_worker.errors import ObjectNotFound, PreconditionFailed
from wmtp_worker.storage.objects import ObjectInfo, PartUpload


class MemoryStore:
    """`ObjectStore`; each call is atomic. `now` tells the server's time in seconds.

    Without `conditional_delete` it is one of those that delete whatever version an object has.
    """

    url = "memory://bucket"

    def __init__(self, now: Callable[[], float] = lambda: 0.0, conditional_delete: bool = True) -> None:
        self.objects: dict[str, tuple[ObjectInfo, bytes]] = {}
        self.changes = 0
        self.conditional_delete = conditional_delete
        self._now = now
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()

    def head(self, key: str) -> ObjectInfo:
        return self._found(key)[0]

    def list(self, prefix: str = "", after: str = "") -> Iterator[ObjectInfo]:
        with self._lock:
            infos = [info for info, _ in self.objects.values()]
        yield from sorted((i for i in infos if i.key.startswith(prefix) and i.key > after), key=lambda i: i.key)

    def get(
        self, key: str, start: int = 0, length: int | None = None, version: str | None = None
    ) -> tuple[ObjectInfo, bytes]:
        info, data = self._found(key)
        if version not in (None, info.version):
            raise PreconditionFailed("changed", where=key)
        return info, data[start:] if length is None else data[start : start + length]

    def put(self, key, data, *, if_absent=False, if_version=None, sha256=None) -> ObjectInfo:
        data = bytes(data)
        with self._lock:
            there = self.objects.get(key)
            if (if_absent and there) or (if_version and (there is None or there[0].version != if_version)):
                raise PreconditionFailed("somebody else was first", where=key)
            return self._keep(key, data, sha256 or hashlib.sha256(data).hexdigest())

    def copy(self, source: str, target: str) -> None:
        info, data = self._found(source)
        with self._lock:
            self._keep(target, data, info.sha256)

    def delete(self, key: str, *, if_version: str | None = None) -> None:
        with self._lock:
            there = self.objects.get(key)
            if self.conditional_delete and there is not None and if_version not in (None, there[0].version):
                raise PreconditionFailed("changed", where=key)
            self.objects.pop(key, None)
            self.changes += 1

    def begin(self, key: str, size: int, sha256: str, part_size: int, token: Mapping[str, str] | None) -> PartUpload:
        raise AssertionError("nothing in these tests is large enough for parts")

    def sweep(self, prefix: str, older_than: timedelta) -> int:
        return 0

    def close(self) -> None:
        pass

    def _keep(self, key: str, data: bytes, sha256: str | None) -> ObjectInfo:
        modified = datetime.fromtimestamp(int(self._now()), UTC)  # whole seconds, as most servers tell them
        info = ObjectInfo(key, len(data), f"v{next(self._numbers)}", sha256, None, modified)
        self.objects[key] = info, data
        self.changes += 1
        return info

    def _found(self, key: str) -> tuple[ObjectInfo, bytes]:
        with self._lock:
            if key not in self.objects:
                raise ObjectNotFound("no such object", where=key)
            return self.objects[key]
