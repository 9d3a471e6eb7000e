"""Which checkpoint to go on from, and what is in it."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file

from wmtp_worker.checkpoint.manifest import Manifest, NewerFormatError, shared_path, verify
from wmtp_worker.checkpoint.ranks import ALONE, Pieces, Ranks, logical_name
from wmtp_worker.checkpoint.snapshot import FROZEN, MODEL
from wmtp_worker.errors import CheckpointError, InputError
from wmtp_worker.storage.layout import RunPaths

log = logging.getLogger(__name__)

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on the local disk. What its manifest does not vouch for is never read."""

    folder: Path
    manifest: Manifest

    def has(self, name: str) -> bool:
        """Whether there are tensors by this name: in files of its own, shared or not, of one rank or several."""
        return bool(self._parts(name))

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors called `name`, whole, on the CPU, however many ranks wrote them.

        A file of one rank is mapped, not read: copy what is to outlive the checkpoint. Raises `CheckpointError` where
        the content is none.
        """
        with self._opening(name) as parts:
            return load_file(parts[0]) if [path.name for path in parts] == [name] else Pieces(parts).tensors()

    def pieces(self, name: str) -> Pieces:
        """The same tensors not read yet, for a model that wants slices of them. Raises `CheckpointError`."""
        with self._opening(name) as parts:
            return Pieces(parts)

    def model_tensors(self) -> dict[str, torch.Tensor]:
        """All weights: those that are trained, and the frozen ones. As `tensors`."""
        return self.tensors(MODEL) | (self.tensors(FROZEN) if self.has(FROZEN) else {})

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

    def _parts(self, name: str) -> list[Path]:
        own = [self.folder / file for file in self.manifest.files if logical_name(file) == name]
        shared = {file: entry for file, entry in self.manifest.shared.items() if logical_name(file) == name}
        return own + [shared_path(self.folder, entry) for entry in shared.values()]

    @contextmanager
    def _opening(self, name: str) -> Iterator[list[Path]]:
        if not (parts := self._parts(name)):
            raise self.malformed(f"the manifest does not list {name}")
        try:
            yield parts
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise self.malformed(f"{name} does not load: {error}") from error


def find(paths: RunPaths, resume: str | int, ranks: Ranks = ALONE) -> Checkpoint | None:
    """The checkpoint to resume from, or None for a fresh start; the same on every rank, each of which must ask.

    `"never"`: none. A number: that step, which must verify. `"auto"`: the newest that verifies; every one passed over
    is logged with its reason and left in place for inspection. One of kind `trainable` has no optimizer state, so only
    a number takes it. Raises `CheckpointError` for a format newer than this worker's (passing it over would repeat paid
    work) and for a wanted step that is damaged, `InputError` for a wanted step that is not there.
    """
    if resume == "never":
        return None
    if isinstance(resume, int):
        return _exactly(paths, resume, ranks)
    for step in reversed(_steps(paths, ranks)):
        folder = paths.step(step)
        try:
            checkpoint = Checkpoint(folder, _verify(folder, ranks))
        except NewerFormatError:
            raise
        except CheckpointError as error:
            log.warning("passed over checkpoint %s: %s", folder.name, error.what)
            continue
        if checkpoint.manifest.kind == "full":
            return checkpoint
        log.warning(
            "passed over checkpoint %s: it has weights only; --resume %d takes it, the optimizer then starts anew",
            folder.name,
            step,
        )
    return None


def _steps(paths: RunPaths, ranks: Ranks) -> list[int]:
    steps: list[int] = ranks.gather(paths.steps())[0]  # one may see a folder that another does not see yet
    return steps


def _verify(folder: Path, ranks: Ranks) -> Manifest:
    with ranks.together():
        manifest = verify(folder, ranks.rank, ranks.world)
    return manifest


def _exactly(paths: RunPaths, step: int, ranks: Ranks) -> Checkpoint:
    available = _steps(paths, ranks)
    if step not in available:
        has = ", ".join(map(str, available)) or "none"
        raise InputError(
            f"run {paths.run!r} has no checkpoint of step {step}",
            where=str(paths.checkpoints),
            fix=f"choose one of its steps ({has})",
        )
    folder = paths.step(step)
    try:
        return Checkpoint(folder, _verify(folder, ranks))
    except NewerFormatError:
        raise
    except CheckpointError as error:
        raise CheckpointError(error.what, where=error.where, fix="use --resume auto to go on from another") from None
