"""`metrics.jsonl`: one JSON object a line, appended as training goes, exact to the last bit of each float."""

import errno
import json
import logging
import os
import time
from collections import deque
from pathlib import Path
from typing import Any, Self

from wmtp_worker.errors import DiskFullError
from wmtp_worker.storage.atomic import disk_errors

log = logging.getLogger(__name__)


class MetricsLog:
    """An append-only record that follows the checkpoint: resuming cuts it back to where the checkpoint saw it.

    Only the run's lock holder may open it. `size` is in bytes and belongs into the checkpoint; what a killed process
    wrote after its last checkpoint is written again by the process that resumes.
    """

    def __init__(self, path: Path, resume_at: int) -> None:
        """Open `path` and drop everything after byte `resume_at` (0 starts anew)."""
        self._waiting: deque[bytes] = deque()
        self._full = False
        with disk_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b", buffering=0)
        there = os.fstat(self._file.fileno()).st_size
        if there < resume_at:
            log.warning("%s is shorter than the checkpoint knew it: steps are missing from the record", path)
        self._size = min(there, resume_at)
        self._file.truncate(self._size)

    @property
    def size(self) -> int:
        """Bytes of all records so far, those included that still wait for room on the disk."""
        self._flush()
        return self._size + sum(map(len, self._waiting))

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one record, with its Unix time, in a single write; the last line is torn only if the machine dies.

        What a full disk does not take is kept in memory, warned about, and written once there is room.
        """
        line = (
            json.dumps({"kind": kind, "step": step, "time": round(time.time(), 3), **values}, ensure_ascii=False) + "\n"
        ).encode()
        self._waiting.append(line)
        self._flush()

    def _flush(self) -> None:
        try:
            while self._waiting:
                self._append(self._waiting[0])
                self._waiting.popleft()
        except DiskFullError as error:
            if not self._full:
                log.warning("the record of the run waits in memory: %s", error)
        self._full = bool(self._waiting)

    def _append(self, line: bytes) -> None:
        with disk_errors(Path(self._file.name).parent):
            try:
                # unbuffered: of what does not fit any more only a part is written, without a word
                if self._file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                self._file.truncate(self._size)
                raise
        self._size += len(line)

    def sync(self) -> None:
        """Make the file durable as it is. From any thread. Raises `DiskFullError`: over a network, or with a quota."""
        with disk_errors(Path(self._file.name).parent):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._flush()
        lacking = bool(self._waiting)
        try:
            self._file.close()
        except OSError:  # a network file system may say only now that there was no room
            lacking = True
        if lacking:
            log.warning("%s lacks its end: the disk is full", self._file.name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read(path: Path) -> list[dict[str, Any]]:
    """Every whole record of a metrics file, in order; a torn last line is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            records.append(json.loads(line))
    return records
