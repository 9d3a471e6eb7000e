"""The files of a folder as objects, in the order of their keys."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from wmtp_worker.storage.atomic import TEMPORARY_PREFIX
from wmtp_worker.storage.objects import ObjectInfo

# deleted since their names were read, or never there
_GONE = (FileNotFoundError, NotADirectoryError)


class Listing:
    """One listing of a folder whose objects' keys begin with `base`, behind the key `after`.

    `inside` says whether a path is within the bucket. `check` is called when something that was there is not any more;
    it raises where that is the bucket, which is never taken for an empty one.
    """

    def __init__(self, after: str, inside: Callable[[str], bool], check: Callable[[], object]) -> None:
        self._after = os.fsencode(after)
        self._inside = inside
        self._check = check

    def walk(self, folder: Path, base: str, beginning: str) -> Iterator[ObjectInfo]:
        """What is in the folder under names that begin so. Memory grows with the largest folder only."""
        try:
            names = self._names(folder, base, beginning)
        except _GONE:
            self._check()
            return
        for _, name, is_folder in names:
            if is_folder:
                yield from self.walk(folder / name, f"{base}{name}/", "")
            elif (info := self._entry(folder / name, base + name)) is not None:
                yield info

    def _names(self, folder: Path, base: str, beginning: str) -> list[tuple[bytes, str, bool]]:
        names = []
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(beginning) and not is_hidden(entry.name):
                    is_folder = entry.is_dir(follow_symlinks=False)
                    # keys below a folder sort as if its name ended in the slash
                    key = os.fsencode(base + entry.name) + b"/" * is_folder
                    if key > self._after or (is_folder and self._after.startswith(key)):
                        names.append((key, entry.name, is_folder))
        return sorted(names)

    def _entry(self, path: Path, key: str) -> ObjectInfo | None:
        try:
            key.encode()
            status = os.lstat(path)
            if stat.S_ISLNK(status.st_mode):
                if not self._inside(os.path.realpath(path)):
                    return None
                status = os.stat(path)
        except UnicodeEncodeError:
            return None
        except _GONE:
            self._check()
            return None
        return info_of(key, status) if stat.S_ISREG(status.st_mode) else None


def is_hidden(name: str) -> bool:
    """Whether a file or folder of that name is no object: it is being written."""
    return name.startswith(TEMPORARY_PREFIX)


def info_of(key: str, status: os.stat_result) -> ObjectInfo:
    """What is known of a file without reading it.

    `modified` is when it got its name, by the clock of whoever keeps the disk (ctime), which all machines share; the
    version has the writer's own time.
    """
    version = f"{status.st_mtime_ns:x}-{status.st_size:x}-{status.st_ino:x}"
    return ObjectInfo(key, status.st_size, version, modified=datetime.fromtimestamp(status.st_ctime, UTC))
