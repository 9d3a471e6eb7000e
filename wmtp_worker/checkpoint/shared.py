"""Frozen tensors: kept once a run, in a file named by its SHA-256, however many checkpoints refer to it."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

from wmtp_worker.checkpoint.manifest import SHARED, SHARED_SUFFIX
from wmtp_worker.checkpoint.staging import Content
from wmtp_worker.checkpoint.tensorfile import LiveFile, digest_of, signature, write_file
from wmtp_worker.errors import CheckpointError
from wmtp_worker.storage.atomic import fsync_path, publish, temporary
from wmtp_worker.storage.layout import MANIFEST, RunPaths
from wmtp_worker.storage.seal import FileEntry

log = logging.getLogger(__name__)


class SharedTensors:
    """Puts frozen tensors on the disk and knows their digests, which it computes once for as long as it lives."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[object, FileEntry]] = {}

    def put(self, paths: RunPaths, name: str, content: Content, heed: Callable[[int], object]) -> FileEntry:
        """See that the file is on the disk, whole and synced, and return what a manifest says of it.

        Atomic: the file has its name only when it is complete. Raises `OSError`, and `CheckpointError` where a tensor
        that should be frozen changed while it was written.
        """
        source, now = LiveFile(content.tensors, content.metadata), _identity(content)
        known, entry = self._known.get(name, (None, None))
        if entry is None or known != now:
            entry = digest_of(source)
        path = paths.checkpoints / SHARED / f"{entry.sha256}{SHARED_SUFFIX}"
        if not (path.is_file() and path.stat().st_size == entry.size):
            _write(path, source, entry, heed)
        self._known[name] = (now, entry)
        return entry


def _identity(content: Content) -> object:
    # the version counts what changes a tensor in place
    where = [(value.data_ptr(), value._version) for value in content.tensors.values()]
    return signature(content.tensors, content.metadata), where


def _write(path: Path, source: LiveFile, entry: FileEntry, heed: Callable[[int], object]) -> None:
    if not path.parent.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        fsync_path(path.parent.parent)
    written = temporary(path)
    try:
        if write_file(written, source, heed) != entry:
            raise CheckpointError("a frozen tensor changed while it was saved", where=str(path), fix="report this")
        publish(written, path)
    finally:
        written.unlink(missing_ok=True)


def prune_shared(paths: RunPaths) -> list[str]:
    """Remove the shared files that no manifest of the run names, set-aside ones included; returns their names.

    Not while a checkpoint is being written. Where a manifest cannot be read, nothing is removed: it may name any.
    """
    folder = paths.checkpoints / SHARED
    if not folder.is_dir():
        return []
    named = set()
    for manifest in paths.checkpoints.rglob(f"step_*/{MANIFEST}"):
        try:
            entries = json.loads(manifest.read_bytes()).get("shared", {}).values()
            named |= {f"{entry['sha256']}{SHARED_SUFFIX}" for entry in entries}
        except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
            log.debug("shared files stay, because %s cannot be read: %s", manifest, error)
            return []
    removed = sorted(path.name for path in folder.glob(f"*{SHARED_SUFFIX}") if path.name not in named)
    removed = [name for name in removed if not name.startswith(".")]
    for name in removed:
        os.unlink(folder / name)
    return removed
