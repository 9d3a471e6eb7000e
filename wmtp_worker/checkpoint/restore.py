"""Which checkpoint to go on from, and what is in it."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from wmtp_worker.checkpoint.manifest import Manifest, NewerFormatError, verify
from wmtp_worker.checkpoint.store import steps
from wmtp_worker.errors import CheckpointError, InputError
from wmtp_worker.storage.layout import RunPaths

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on the local disk."""

    folder: Path
    manifest: Manifest

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of one safetensors file, on the CPU."""
        return load_file(self.folder / name)

    def document(self, name: str) -> Any:
        """One JSON file's content."""
        return json.loads((self.folder / name).read_text(encoding="utf-8"))


def find(paths: RunPaths, resume: str | int) -> Checkpoint | None:
    """The checkpoint to resume from, or None for a fresh start.

    `"never"`: none. A number: that step, which must verify. `"auto"`: the newest that verifies; every one passed over
    is logged with its reason and left in place for inspection. Raises `CheckpointError` for a format newer than this
    worker's (passing it over would repeat paid work) and for a wanted step that is damaged, `InputError` for a wanted
    step that is not there.
    """
    if resume == "never":
        return None
    if isinstance(resume, int):
        return _exactly(paths, resume)
    for step in reversed(steps(paths)):
        folder = paths.step(step)
        try:
            return Checkpoint(folder, verify(folder))
        except NewerFormatError:
            raise
        except CheckpointError as error:
            log.warning("passed over checkpoint %s: %s", folder.name, error.what)
    return None


def _exactly(paths: RunPaths, step: int) -> Checkpoint:
    available = steps(paths)
    if step not in available:
        has = ", ".join(map(str, available)) or "none"
        raise InputError(
            f"run {paths.run!r} has no checkpoint of step {step}",
            where="--resume",
            fix=f"choose one of its steps ({has}), or auto",
        )
    folder = paths.step(step)
    try:
        return Checkpoint(folder, verify(folder))
    except NewerFormatError:
        raise
    except CheckpointError as error:
        raise CheckpointError(error.what, where=error.where, fix="use --resume auto to go on from another") from None
