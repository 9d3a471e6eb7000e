"""A file that is being filled part by part, and a record of the parts that are in it."""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from wmtp_worker.errors import DiskFullError
from wmtp_worker.storage.atomic import disk_errors, fsync_path, publish
from wmtp_worker.storage.objects import ObjectInfo

if TYPE_CHECKING:
    from typing_extensions import Buffer

SMALL = ".small"  # of a download by one request
_THERE = b"\1"


class Partial:
    """`<name>.data` and `<name>.state` in a hidden folder. Survives a kill: a part is marked after it is written.

    What is there counts only if it was begun for the same version of the same object; otherwise it is thrown away. A
    crash of the machine may lose written parts that are marked: the digest of the whole file tells.
    """

    def __init__(self, place: Path, url: str, info: ObjectInfo, part_size: int) -> None:
        self._data = place.with_name(f"{place.name}.data")
        self._state = place.with_name(f"{place.name}.state")
        self._part_size = part_size
        self.count = -(-info.size // part_size)
        facts = json.dumps([url, info.key, info.version, info.size, part_size])
        header = hashlib.sha256(facts.encode("utf-8", "surrogatepass")).digest()
        with disk_errors(place.parent):
            self._marks = self._read_marks(header)
            if not self._marks:
                self._start(header)
            self.descriptor = os.open(self._data, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            self._state_descriptor = os.open(self._state, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        self._offset = len(header)
        self._check_room(info.size)

    @property
    def resumed(self) -> bool:
        """Whether some parts were there when it was opened."""
        return bool(self._marks)

    def has(self, number: int) -> bool:
        """Whether this part was there when it was opened."""
        return self._marks[number : number + 1] == _THERE

    def write(self, number: int, data: "Buffer") -> None:
        """Write one part and mark it. From any thread."""
        view = memoryview(data).cast("B")
        offset = number * self._part_size
        with disk_errors(self._data.parent):
            while view:
                written = os.pwrite(self.descriptor, view, offset)
                view, offset = view[written:], offset + written
            os.pwrite(self._state_descriptor, _THERE, self._offset + number)

    def publish(self, path: Path, *, durable: bool) -> os.stat_result:
        """Rename the whole file to `path`; `durable`: it outlives a crash of the machine from now on."""
        with disk_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            if durable:
                fsync_path(self._data)
                publish(self._data, path)
            else:
                self._data.replace(path)
            self._state.unlink(missing_ok=True)
            return os.fstat(self.descriptor)

    def remove(self) -> None:
        """Throw away what is there. Threads that still write do so to a file without a name."""
        remove(self._data.with_suffix(""))

    def close(self) -> None:
        os.close(self.descriptor)
        os.close(self._state_descriptor)

    def _read_marks(self, header: bytes) -> bytes:
        try:
            state = self._state.read_bytes()
            os.lstat(self._data)
        except FileNotFoundError:
            return b""
        marks = state[len(header) :]
        return marks if state.startswith(header) and _THERE in marks else b""

    def _start(self, header: bytes) -> None:
        self.remove()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        os.close(os.open(self._data, flags, 0o666))
        descriptor = os.open(self._state, flags, 0o600)
        try:
            os.write(descriptor, header)
        finally:
            os.close(descriptor)

    def _check_room(self, size: int) -> None:
        """Refuse before the first byte what cannot fit anyway."""
        missing = size - self._marks.count(_THERE) * self._part_size
        free = os.statvfs(self._data.parent)
        if missing > free.f_bavail * free.f_frsize:
            self.close()
            self.remove()
            raise DiskFullError(
                f"{missing / 1e6:.0f} MB are to be written, {free.f_bavail * free.f_frsize / 1e6:.0f} MB are free",
                where=str(self._data.parent.parent),
                fix="free some space, or set WMTP_WORKDIR to a larger disk",
            )


def remove(place: Path) -> None:
    """Remove the files of a partial download, if there."""
    for suffix in (".state", ".data", SMALL):
        with contextlib.suppress(FileNotFoundError):
            place.with_name(f"{place.name}{suffix}").unlink()
