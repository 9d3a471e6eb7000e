"""Which checkpoint to go on from, and what is in it."""

import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file

from wmtp_worker.checkpoint.manifest import SHARED, Manifest, NewerFormatError, shared_path, verify
from wmtp_worker.checkpoint.ranks import ALONE, Pieces, Ranks, logical_name
from wmtp_worker.checkpoint.snapshot import FROZEN, MODEL, OPTIMIZER
from wmtp_worker.checkpoint.tensorfile import Tensors, read_file
from wmtp_worker.errors import CheckpointError, InputError
from wmtp_worker.host.limits import memory_available
from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.storage.seal import FileEntry, file_entry

log = logging.getLogger(__name__)

Kind = TypeVar("Kind")

# of the memory that is free, for one file: another is read at the same time
_LARGEST_SHARE = 0.6


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on the local disk. What its manifest does not vouch for is never read.

    `loaded` are tensors that were read when their file was verified.
    """

    folder: Path
    manifest: Manifest
    loaded: dict[Path, Tensors] = field(default_factory=dict, repr=False, compare=False)

    def has(self, name: str) -> bool:
        """Whether there are tensors by this name: in files of its own, shared or not, of one rank or several."""
        return bool(self._parts(name))

    def tensors(self, name: str) -> Tensors:
        """The tensors called `name`, whole, on the CPU, however many ranks wrote them. They are the caller's.

        Raises `CheckpointError` where the content is none.
        """
        with self._opening(name) as parts:
            if len(parts) == 1 and (loaded := self.loaded.pop(parts[0], None)) is not None:
                return loaded
            return _Mapped(parts[0]) if [path.name for path in parts] == [name] else Pieces(parts).tensors()

    def pieces(self, name: str) -> Pieces:
        """The same tensors not read yet, for a model that wants slices of them. Raises `CheckpointError`."""
        with self._opening(name) as parts:
            return Pieces(parts)

    def model_tensors(self) -> Tensors:
        """All weights: those that are trained, and the frozen ones. As `tensors`."""
        return {**self.tensors(MODEL), **self.tensors(FROZEN)} if self.has(FROZEN) else self.tensors(MODEL)

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


class _Mapped(Mapping[str, torch.Tensor]):
    """The tensors of a file that memory does not hold at once: each is a copy, made when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._mapped = load_file(path)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._mapped[name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._mapped)

    def __len__(self) -> int:
        return len(self._mapped)


def find(
    paths: RunPaths,
    resume: str | int,
    ranks: Ranks = ALONE,
    *,
    heed: Callable[[int], object] = lambda size: None,
    read: Collection[str] = (MODEL, FROZEN, OPTIMIZER),
) -> Checkpoint | None:
    """The checkpoint to resume from, or None for a fresh start; the same on every rank, each of which must ask.

    `"never"`: none. A number: that step, which must verify. `"auto"`: the newest that verifies; every one passed over
    is logged with its reason and left in place for inspection. One of kind `trainable` has no optimizer state, so only
    a number takes it. Raises `CheckpointError` for a format newer than this worker's (passing it over would repeat paid
    work) and for a wanted step that is damaged, `InputError` for a wanted step that is not there.

    Every byte is read once: the tensors called one of `read` are kept meanwhile, as far as memory has room for them.
    `heed` is called with the size of each block, in any thread; what it raises ends the search.
    """
    if resume == "never":
        return None
    reader = _Reader(heed, read if ranks.world == 1 else ())
    if isinstance(resume, int):
        return _exactly(paths, resume, ranks, reader)
    for step in reversed(_steps(paths, ranks)):
        folder = paths.step(step)
        try:
            checkpoint = _verify(folder, ranks, reader)
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


class _Reader:
    """Reads files that are verified, and keeps the tensors of those that are wanted."""

    def __init__(self, heed: Callable[[int], object], wanted: Collection[str]) -> None:
        self._heed, self._wanted = heed, wanted
        self.loaded: dict[Path, Tensors] = {}

    def __call__(self, path: Path) -> FileEntry:
        name = FROZEN if path.parent.name == SHARED else path.name
        free = memory_available()
        if name not in self._wanted or (free is not None and path.stat().st_size > _LARGEST_SHARE * free):
            return file_entry(path, self._heed)
        entry, tensors = read_file(path, self._heed)
        if tensors is not None:
            self.loaded[path] = tensors
        return entry


def _verify(folder: Path, ranks: Ranks, reader: _Reader) -> Checkpoint:
    reader.loaded = {}  # nothing of a checkpoint that was passed over
    with ranks.together():
        manifest = verify(folder, ranks.rank, ranks.world, reader)
    return Checkpoint(folder, manifest, reader.loaded)


def _exactly(paths: RunPaths, step: int, ranks: Ranks, reader: _Reader) -> Checkpoint:
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
        return _verify(folder, ranks, reader)
    except NewerFormatError:
        raise
    except CheckpointError as error:
        raise CheckpointError(error.what, where=error.where, fix="use --resume auto to go on from another") from None
