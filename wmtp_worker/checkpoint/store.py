"""The checkpoints of one run on the local disk: written whole or not at all, pruned, set aside, listed."""

import os
import shutil
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

from wmtp_worker.checkpoint.manifest import SHARED, Manifest, read_manifest
from wmtp_worker.checkpoint.ranks import ALONE, Ranks, file_name, own_part
from wmtp_worker.checkpoint.shared import SharedTensors, prune_shared
from wmtp_worker.checkpoint.snapshot import FROZEN, Snapshot
from wmtp_worker.checkpoint.staging import Content
from wmtp_worker.checkpoint.tensorfile import LiveFile, Source, write_file
from wmtp_worker.errors import CheckpointError, DiskFullError
from wmtp_worker.host.workdir import prepare
from wmtp_worker.storage.atomic import (
    TEMPORARY_PREFIX,
    disk_errors,
    fsync_path,
    publish,
    set_aside,
    temporary,
    write_json,
)
from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.storage.runlock import run_lock
from wmtp_worker.storage.seal import FileEntry, file_entry

__all__ = ["Snapshot", "contents_of", "make_ready", "prune", "sweep", "write"]

# one alone waits for the disk or for SHA-256; more gain nothing
_FILES_AT_ONCE = 2


def contents_of(snapshot: Snapshot, ranks: Ranks = ALONE) -> dict[str, Content]:
    """The tensor files that this rank writes. The tensors themselves, not copies."""
    contents = {file_name(name, ranks): own_part(tensors, ranks) for name, tensors in snapshot.tensors.items()}
    return {name: content for name, content in contents.items() if content.tensors or ranks.world == 1}


def write(
    paths: RunPaths,
    snapshot: Snapshot,
    *,
    ranks: Ranks = ALONE,
    staged: Mapping[str, Source] | None = None,
    shared: SharedTensors | None = None,
    heed: Callable[[int], object] = lambda size: None,
    files_at_once: int = _FILES_AT_ONCE,
) -> Path:
    """Write `step_N` and return its folder. Every rank calls this; where one fails, all raise and there is no `step_N`.

    Atomic: files, then the manifest, all synced under a hidden name, then one rename. A crash at any point leaves
    either no `step_N` or the whole one. A folder that already has the name (a damaged one that was passed over) is
    set aside, never overwritten. Raises `DiskFullError` or `InputError` with what is half written removed.

    The tensors are read from `staged` where that is given, else where they are. `heed` is called with the size of each
    block before it is written, in any thread; what it raises ends the save.
    """
    folder = paths.step(snapshot.step)
    building: Path = ranks.gather(temporary(folder))[0]
    sources = contents_to_sources(contents_of(snapshot, ranks)) if staged is None else staged
    files: dict[str, FileEntry] = {}
    frozen: dict[str, FileEntry] = {}
    try:
        with ranks.together(), disk_errors(paths.checkpoints):
            if ranks.first:
                building.mkdir(parents=True)
        with ranks.together(), disk_errors(paths.checkpoints):

            def write_one(name: str) -> FileEntry:
                return write_file(building / name, sources[name], heed)

            if files_at_once == 1:
                files = {name: write_one(name) for name in sources}
            else:
                with ThreadPoolExecutor(files_at_once, "files") as pool:
                    files = dict(zip(sources, pool.map(write_one, sources), strict=True))
            if content := own_part(snapshot.frozen, ranks):
                name = file_name(FROZEN, ranks)
                if content.tensors:
                    frozen[name] = (shared or SharedTensors()).put(paths, name, content, heed)
        told = ranks.gather((files, frozen))
        with ranks.together(), disk_errors(paths.checkpoints):
            if ranks.first:
                _finish(paths, snapshot, building, told)
    finally:
        if ranks.first:
            shutil.rmtree(building, ignore_errors=True)
    return folder


def contents_to_sources(contents: Mapping[str, Content]) -> dict[str, Source]:
    return {name: LiveFile(content.tensors, content.metadata) for name, content in contents.items()}


def _finish(
    paths: RunPaths,
    snapshot: Snapshot,
    building: Path,
    told: list[tuple[dict[str, FileEntry], dict[str, FileEntry]]],
) -> None:
    """Documents, the manifest of what all ranks wrote, one rename."""
    files = {name: entry for own, _ in told for name, entry in own.items()}
    shared = {name: entry for _, frozen in told for name, entry in frozen.items()}
    for name, document in snapshot.documents.items():
        write_json(building / name, document)
        files[name] = file_entry(building / name)
    facts = {"kind": snapshot.kind, "world_size": len(told), "trainable": "part" if shared else "all"}
    Manifest(
        step=snapshot.step,
        run=paths.run,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        files=files,
        shared=shared,
        **{**facts, **snapshot.facts},
    ).write(building)
    fsync_path(building)
    folder = paths.step(snapshot.step)
    if os.path.lexists(folder):
        set_aside(paths.checkpoints, [folder])
    publish(building, folder)


def prune(paths: RunPaths, keep_last: int, newest: int, spare: Collection[int] = (), keep_every: int = 0) -> list[int]:
    """Remove all but the last `keep_last` full checkpoints up to step `newest`, the one just written; returns those
    removed. Shared files that no manifest names any more go with them.

    Steps in `spare` stay: they are on their way to the bucket. Full ones of multiples of `keep_every` stay for good.
    Later ones did not verify when the run went on from an earlier one: they take nobody's place, nor do those without
    the optimizer's state. A folder is renamed before it is emptied, so a crash leaves no half checkpoint under a valid
    name. Not while a checkpoint is being written.
    """
    steps = [step for step in paths.steps() if step <= newest]
    full = [step for step in steps if _is_full(paths.step(step))]
    oldest = full[-keep_last] if len(full) >= keep_last else 0
    milestones = {step for step in full if keep_every and step % keep_every == 0}
    removed = [step for step in steps if step < oldest and step not in spare and step not in milestones]
    with disk_errors(paths.checkpoints):
        for step in removed:
            doomed = temporary(paths.step(step))
            paths.step(step).rename(doomed)
            shutil.rmtree(doomed)
        prune_shared(paths)
    return removed


def _is_full(folder: Path) -> bool:
    try:
        return read_manifest(folder).kind == "full"
    except CheckpointError:
        return False


def make_ready(paths: RunPaths) -> list[str]:
    """`prepare` the work directory, after a sweep where the disk is full; the names of what was swept.

    Raises what `prepare` does, and RunHeldError where the disk is full and another process trains the run.
    """
    try:
        prepare(paths.workdir)
        return []
    except DiskFullError:
        with run_lock(paths.lock):
            swept = sweep(paths)
        prepare(paths.workdir)
        return swept


def sweep(paths: RunPaths) -> list[str]:
    """Remove what a killed process left half written; only for the holder of the run's lock. Returns the names."""
    swept = []
    folders = (paths.checkpoints, paths.checkpoints / SHARED, paths.logs)
    with disk_errors(paths.checkpoints):
        for path in [path for folder in folders for path in folder.glob(f"{TEMPORARY_PREFIX}*")]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
            swept.append(path.name)
    return sorted(swept)
