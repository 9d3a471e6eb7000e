"""What a transfer of a folder was to do, did, and could not do."""

import threading
from dataclasses import dataclass, field
from typing import Literal

from wmtp_worker.errors import StorageError, WorkerError
from wmtp_worker.storage.transfer.paths import shown

Kind = Literal["upload", "download", "delete", "skip", "verify"]


@dataclass(frozen=True, slots=True)
class Action:
    """One thing to do; `key` is relative to the folder, `size` in bytes."""

    kind: Kind
    key: str
    size: int


@dataclass
class Report:
    """Counts by kind of action: `planned` (what differs, or was skipped as equal) and `done`.

    `files` and `bytes` are what travelled, parts that a resumed transfer found in place not counted in `bytes`.
    `actions` is filled by a dry run only. `failed` are keys with their errors; other files went on.
    """

    planned: dict[Kind, int] = field(default_factory=dict)
    done: dict[Kind, int] = field(default_factory=dict)
    files: int = 0
    bytes: int = 0
    seconds: float = 0.0
    actions: list[Action] = field(default_factory=list)
    failed: list[tuple[str, WorkerError]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def plan(self, action: Action, *, listed: bool = False) -> None:
        """Count an action that was decided on; `listed` keeps it, for a dry run."""
        with self._lock:
            self.planned[action.kind] = self.planned.get(action.kind, 0) + 1
            if listed:
                self.actions.append(action)

    def did(self, kind: Kind, sent: int | None = None) -> None:
        """Count an action that succeeded; `sent` are the bytes of a file that travelled."""
        with self._lock:
            self.done[kind] = self.done.get(kind, 0) + 1
            if sent is not None:
                self.files += 1
                self.bytes += sent

    def skip(self) -> None:
        """Count a file that is the same on both sides."""
        with self._lock:
            self.planned["skip"] = self.planned.get("skip", 0) + 1
            self.done["skip"] = self.done.get("skip", 0) + 1

    def fail(self, key: str, error: WorkerError) -> None:
        """Keep an error that concerns one file alone."""
        with self._lock:
            self.failed.append((key, error))

    def raise_for_failures(self) -> None:
        """Raise an error that names the first failures; its kind is that of the first."""
        if not self.failed:
            return
        first_ones = "; ".join(f"{shown(key)}: {shown(error.what)}" for key, error in self.failed[:3])
        more = f"; and {len(self.failed) - 3} more" if len(self.failed) > 3 else ""
        first = self.failed[0][1]
        kind = type(first) if isinstance(first, WorkerError) else StorageError
        raise kind(
            f"{len(self.failed)} files failed: {first_ones}{more}",
            where=shown(first.where or "") or None,
            fix=first.fix,
        ) from first
