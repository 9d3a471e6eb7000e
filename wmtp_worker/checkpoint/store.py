"""The checkpoints of one run on the local disk: written whole or not at all, pruned, set aside, listed."""

import os
import shutil
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from wmtp_worker.checkpoint.manifest import Manifest
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
from wmtp_worker.storage.seal import FileEntry, file_entry


@dataclass(frozen=True)
class Snapshot:
    """Everything a checkpoint holds: tensors by file and name, JSON documents by file, and facts for the manifest."""

    step: int
    tensors: Mapping[str, Mapping[str, torch.Tensor]]
    documents: Mapping[str, Any]
    facts: Mapping[str, Any] = field(default_factory=dict)


def write(paths: RunPaths, snapshot: Snapshot) -> Path:
    """Write `step_N` and return its folder.

    Atomic: files, then the manifest, all synced under a hidden name, then one rename. A crash at any point leaves
    either no `step_N` or the whole one. A folder that already has the name (a damaged one that was passed over) is
    set aside, never overwritten. Raises `DiskFullError` or `InputError` with what is half written removed.
    """
    folder = paths.step(snapshot.step)
    building = temporary(folder)
    try:
        with disk_errors(paths.checkpoints):
            building.mkdir(parents=True)
            for name, tensors in snapshot.tensors.items():
                # a reader on another device needs no more than the values
                save_file(
                    {key: value.detach().cpu().contiguous() for key, value in tensors.items()},
                    building / name,
                )
            for name, document in snapshot.documents.items():
                write_json(building / name, document)
            manifest = Manifest(
                step=snapshot.step,
                run=paths.run,
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                files=_seal(building, [*snapshot.tensors, *snapshot.documents]),
                **snapshot.facts,
            )
            manifest.write(building)
            fsync_path(building)
            if os.path.lexists(folder):
                set_aside(paths.checkpoints, [folder])
            publish(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def _seal(folder: Path, names: list[str]) -> dict[str, FileEntry]:
    """Sync every file to the disk, and hash it from memory meanwhile."""
    files = [folder / name for name in names]
    with ThreadPoolExecutor() as pool:
        synced = pool.map(fsync_path, files)
        hashed = dict(zip(names, pool.map(file_entry, files), strict=True))
        list(synced)  # raises what a sync raised
    return hashed


def prune(paths: RunPaths, keep_last: int, newest: int, spare: Collection[int] = ()) -> list[int]:
    """Remove all but the last `keep_last` checkpoints up to step `newest`, the one just written; returns those removed.

    Steps in `spare` stay: they are on their way to the bucket.
    Later ones did not verify when the run went on from an earlier one: they take nobody's place. A folder is renamed
    before it is emptied, so a crash leaves no half checkpoint under a valid name.
    """
    removed = [step for step in [step for step in paths.steps() if step <= newest][:-keep_last] if step not in spare]
    with disk_errors(paths.checkpoints):
        for step in removed:
            doomed = temporary(paths.step(step))
            paths.step(step).rename(doomed)
            shutil.rmtree(doomed)
    return removed


def sweep(paths: RunPaths) -> list[str]:
    """Remove what a killed process left half written; only for the holder of the run's lock. Returns the names."""
    swept = []
    with disk_errors(paths.checkpoints):
        for path in [*paths.checkpoints.glob(f"{TEMPORARY_PREFIX}*"), *paths.logs.glob(f"{TEMPORARY_PREFIX}*")]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
            swept.append(path.name)
    return sorted(swept)
