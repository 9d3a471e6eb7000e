"""Which checkpoint to go on from, and what is in it."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file

from wmtp_worker.checkpoint.manifest import Manifest, NewerFormatError, verify
from wmtp_worker.errors import CheckpointError, InputError
from wmtp_worker.storage.layout import RunPaths

log = logging.getLogger(__name__)

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on the local disk. What its manifest does not vouch for is never read."""

    folder: Path
    manifest: Manifest

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of one safetensors file, on the CPU. Raises `CheckpointError` where it is none."""
        try:
            return load_file(self._listed(name))
        except (OSError, SafetensorError) as error:
            raise self.malformed(f"{name} does not load: {error}") from error

    def document(self, name: str, kind: type[Kind]) -> Kind:
        """One JSON file's content as a `kind`. Raises `CheckpointError` where it is none."""
        try:
            return TypeAdapter(kind).validate_python(json.loads(self._listed(name).read_bytes()))
        except (OSError, ValueError, RecursionError) as error:  # pydantic's errors are ValueErrors
            raise self.malformed(f"{name} does not load: {error}") from error

    def malformed(self, what: str) -> CheckpointError:
        """The error for content that makes no sense, though it has the SHA-256 that the manifest says."""
        return CheckpointError(what, where=str(self.folder), fix="choose another of its steps with --resume STEP")

    def _listed(self, name: str) -> Path:
        if name not in self.manifest.files:
            raise self.malformed(f"the manifest does not list {name}")
        return self.folder / name


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
    for step in reversed(paths.steps()):
        folder = paths.step(step)
        try:
            return Checkpoint(folder, verify(folder))
        except NewerFormatError:
            raise
        except CheckpointError as error:
            log.warning("passed over checkpoint %s: %s", folder.name, error.what)
    return None


def _exactly(paths: RunPaths, step: int) -> Checkpoint:
    available = paths.steps()
    if step not in available:
        has = ", ".join(map(str, available)) or "none"
        raise InputError(
            f"run {paths.run!r} has no checkpoint of step {step}",
            where=str(paths.checkpoints),
            fix=f"choose one of its steps ({has})",
        )
    folder = paths.step(step)
    try:
        return Checkpoint(folder, verify(folder))
    except NewerFormatError:
        raise
    except CheckpointError as error:
        raise CheckpointError(error.what, where=error.where, fix="use --resume auto to go on from another") from None
