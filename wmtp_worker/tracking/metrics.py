"""`metrics.jsonl`: one JSON object a line, appended as training goes, exact to the last bit of each float."""

import errno
import json
import logging
import os
from pathlib import Path
from typing import Any, Self

from wmtp_worker.storage.atomic import disk_errors

log = logging.getLogger(__name__)


class MetricsLog:
    """An append-only record that follows the checkpoint: resuming cuts it back to where the checkpoint saw it.

    Only the run's lock holder may open it. `size` is in bytes and belongs into the checkpoint; what a killed process
    wrote after its last checkpoint is written again by the process that resumes.
    """

    def __init__(self, path: Path, resume_at: int) -> None:
        """Open `path` and drop everything after byte `resume_at` (0 starts anew)."""
        with disk_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b", buffering=0)
        if self.size < resume_at:
            log.warning("%s is shorter than the checkpoint knew it: steps are missing from the record", path)
        self._file.truncate(min(self.size, resume_at))

    @property
    def size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one record in a single write; a torn last line is possible only if the machine dies."""
        line = (json.dumps({"kind": kind, "step": step, **values}, ensure_ascii=False) + "\n").encode()
        with disk_errors(Path(self._file.name).parent):
            # unbuffered: what does not fit any more is not written, without a word
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def sync(self) -> int:
        """Make everything so far durable; returns the size that a checkpoint may rely on."""
        os.fsync(self._file.fileno())
        return self.size

    def close(self) -> None:
        self._file.close()

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
