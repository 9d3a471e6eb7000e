"""Large uploads into a folder: one hidden file each, which another process can go on with."""

from __future__ import annotations

import fcntl
import os
import threading
import uuid
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from wmtp_worker.storage.objects import ObjectInfo, check_whole

if TYPE_CHECKING:
    from typing_extensions import Buffer

_NOTE = ".key"


class Staged:
    """An unfinished file, and the note beside it that says of which key. Locked as long as a live upload has it."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self.descriptor = descriptor
        self.path = path
        self._close = weakref.finalize(self, os.close, descriptor)

    @classmethod
    def open(cls, folder: Path, name: str, key: str) -> Staged:
        """What a dead process left under that name, or a new file where there is none or somebody is at it."""
        path = folder / name
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            staged = cls(descriptor, path)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                staged.close()
                path = folder / f"{name}-{uuid.uuid4().hex}"
                continue
            # whoever had the lock before may have finished, and the name may be gone or another file's
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    path.with_name(path.name + _NOTE).write_text(key, encoding="utf-8")
                    return staged
            staged.close()

    def close(self) -> None:
        """Let another process have the file."""
        self._close()

    def discard(self) -> None:
        """Remove the file, if it has not been renamed, and its note."""
        self.path.unlink(missing_ok=True)
        self.path.with_name(self.path.name + _NOTE).unlink(missing_ok=True)
        self.close()


class DirectoryUpload:
    """`PartUpload` into one hidden file. Parts may come in any order."""

    def __init__(
        self,
        staged: Staged,
        size: int,
        part_size: int,
        publish: Callable[[Path], ObjectInfo],
        errors: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._staged = staged
        self._size = size
        self._part_size = part_size
        self._publish = publish
        self._errors = errors
        self._arrived: dict[int, int] = {}  # number to length
        self._lock = threading.Lock()

    @property
    def part_size(self) -> int:
        """As it was asked for."""
        return self._part_size

    @property
    def sequential(self) -> bool:
        """Any order is fine."""
        return False

    @property
    def token(self) -> Mapping[str, str]:
        """Nothing is needed: the unfinished file is found by its name."""
        return {}

    def has(self, number: int, data: Buffer) -> bool:
        """See `PartUpload`. Compares the bytes themselves."""
        with self._errors():
            there = os.pread(self._staged.descriptor, memoryview(data).nbytes, number * self._part_size)
        if there != data:
            return False
        self._note(number, data)
        return True

    def put(self, number: int, data: Buffer) -> None:
        """See `PartUpload`."""
        view, offset = memoryview(data).cast("B"), number * self._part_size
        with self._errors():
            done = 0
            while done < view.nbytes:
                done += os.pwrite(self._staged.descriptor, view[done:], offset + done)
        self._note(number, data)

    def _note(self, number: int, data: Buffer) -> None:
        with self._lock:
            self._arrived[number] = memoryview(data).nbytes

    def finish(self) -> ObjectInfo:
        """See `PartUpload`. When it returns, the file and its name are on the disk."""
        check_whole(self._arrived, self._size)
        with self._errors():
            os.ftruncate(self._staged.descriptor, self._size)
            os.fsync(self._staged.descriptor)
        info = self._publish(self._staged.path)
        self._staged.discard()
        return info

    def abort(self) -> None:
        """See `PartUpload`."""
        with self._errors():
            self._staged.discard()

    def close(self) -> None:
        """Stop without finishing: another process may go on."""
        self._staged.close()


def sweep(folder: Path, beginning: str, before: float) -> int:
    """Remove files last written before that time whose key begins so, or that have no key; count those with one."""
    swept = 0
    with suppress(FileNotFoundError):
        for path in list(folder.iterdir()):
            note = path.with_name(path.name + _NOTE)
            with suppress(FileNotFoundError):
                if path.suffix == _NOTE or path.stat().st_mtime > before:
                    continue
                has_key = note.exists()
                if has_key and not note.read_text(encoding="utf-8").startswith(beginning):
                    continue
                path.unlink()
                note.unlink(missing_ok=True)
                swept += has_key
    return swept
