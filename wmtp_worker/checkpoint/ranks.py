"""Checkpoints of several ranks: who writes which piece of which tensor, how they agree, how pieces come together again.

Each rank writes what it holds to a file of its own, `model.rank00001-of-00004.safetensors`; what all of them hold, one
writes. Where a piece lies in its tensor is in the header's `__metadata__`, so another number of ranks can read the
slices it needs. All ranks see the same folder.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import _TYPES

from wmtp_worker.checkpoint.staging import Content
from wmtp_worker.checkpoint.tensorfile import Tensors
from wmtp_worker.errors import DiskFullError, WorkerError

_PIECES = "pieces"
_PIECE_NAME = re.compile(r"(.+)\.rank\d{5}-of-\d{5}(\.safetensors)")


@dataclass(frozen=True)
class Ranks:
    """The processes that write one checkpoint together, and how they agree. `ALONE` needs no process group."""

    rank: int = 0
    world: int = 1
    group: Any = None

    @classmethod
    def of_process_group(cls, timeout_seconds: float = 1800) -> "Ranks":
        """All ranks of the process group, over a gloo group of their own: the writer's words never get between the
        collectives of the training. Every rank must call this. A rank that is gone fails the others after the time-out.
        """
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return ALONE
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        return cls(dist.get_rank(), dist.get_world_size(), group)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def gather(self, mine: Any) -> list[Any]:
        """What each rank brings, by rank, on every rank. Small things only."""
        if self.world == 1:
            return [mine]
        every: list[Any] = [None] * self.world
        dist.all_gather_object(every, mine, group=self.group)
        return every

    @contextmanager
    def together(self) -> Iterator[None]:
        """What one rank cannot do, none has done: an error of one is raised on all, a full disk before any other."""
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        if self.world > 1:
            told = [other for other in self.gather(_sent(error)) if other is not None]
            if told:
                raise min(told, key=lambda other: not isinstance(other, DiskFullError)) from error
        elif error is not None:
            raise error


ALONE = Ranks()


def _sent(error: Exception | None) -> WorkerError | None:
    if error is None or isinstance(error, WorkerError):
        return error
    return WorkerError(f"{type(error).__name__}: {error}")  # others may not survive the way to another process


# --- writing -----------------------------------------------------------------------------------------------------


def file_name(name: str, ranks: Ranks) -> str:
    """The file that this rank writes for `name`: its own where there are several."""
    if ranks.world == 1:
        return name
    stem, dot, suffix = name.rpartition(".")
    return f"{stem}.rank{ranks.rank:05d}-of-{ranks.world:05d}{dot}{suffix}"


def logical_name(file: str) -> str:
    """The name that all ranks' files of one kind stand for; a file of one rank alone is its own."""
    match = _PIECE_NAME.fullmatch(file)
    return match[1] + match[2] if match else file


def own_part(tensors: Tensors, ranks: Ranks) -> Content:
    """What this rank writes: the pieces it holds of sharded tensors, and, on rank 0, what is not sharded. No copies.

    Modules under FSDP2 must be sharded when their parameters are listed (`reshard()`), as they are after a backward.
    Of a piece that several ranks hold, the one that is first in each replicated dimension of the mesh writes it.
    """
    mine: dict[str, torch.Tensor] = {}
    pieces: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if not is_sharded(tensor):
            if ranks.first:
                mine[name] = tensor
            continue
        if not _writes(tensor):
            continue
        local, offsets = _local(tensor)
        if local.numel():
            mine[name] = local
            pieces[name] = {"shape": list(tensor.shape), "offset": list(offsets)}
    return Content(mine, {_PIECES: json.dumps(pieces)} if pieces else {})


def is_sharded(tensor: torch.Tensor) -> bool:
    return dist.is_available() and hasattr(tensor, "__create_chunk_list__")


def _writes(tensor: Any) -> bool:
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return False
    return all(
        not placement.is_replicate() or at == 0 for placement, at in zip(tensor.placements, coordinate, strict=True)
    )


def _local(tensor: Any) -> tuple[torch.Tensor, Sequence[int]]:
    """The piece of a `DTensor` that lies on this rank, and its offset in each dimension. Raises for partial sums."""
    local = tensor.detach().to_local()
    return local, tensor.__create_chunk_list__()[0].offsets if local.numel() else [0] * tensor.ndim


# --- reading -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Piece:
    file: Path
    shape: tuple[int, ...]  # of the whole tensor
    begin: tuple[int, ...]
    size: tuple[int, ...]


class Pieces:
    """The tensors that lie in one or several safetensors files, whole or in pieces."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Reads the headers. Raises `SafetensorError`, `OSError`, and `ValueError` for pieces that make no tensor."""
        self._pieces: dict[str, list[_Piece]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        for file in files:
            with safe_open(file, framework="pt") as opened:
                told = json.loads((opened.metadata() or {}).get(_PIECES, "{}"))
                for name in opened.keys():  # noqa: SIM118  # it is no mapping
                    part = opened.get_slice(name)
                    size = tuple(part.get_shape())
                    where = told.get(name, {"shape": size, "offset": [0] * len(size)})
                    piece = _Piece(file, tuple(where["shape"]), tuple(where["offset"]), size)
                    self._pieces.setdefault(name, []).append(piece)
                    self._dtypes[name] = _dtype(part.get_dtype())
        for name, pieces in self._pieces.items():
            _check(name, pieces)

    def specs(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Shape and dtype of each whole tensor."""
        return {name: (torch.Size(pieces[0].shape), self._dtypes[name]) for name, pieces in self._pieces.items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor, whole, on the CPU."""
        whole = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in self.specs().items()}
        self.read_into(whole)
        return whole

    def read_into(self, targets: Tensors) -> None:
        """Copy each named tensor, or of a sharded one the slices that lie on this rank, into `targets` of its shape."""
        wanted: dict[Path, list[tuple[str, _Piece]]] = {}
        for name in targets:
            for piece in self._pieces[name]:
                wanted.setdefault(piece.file, []).append((name, piece))
        for file, pieces in wanted.items():
            with torch.no_grad(), safe_open(file, framework="pt") as opened:
                for name, piece in pieces:
                    target = targets[name]
                    local, offset = _local(target) if is_sharded(target) else (target.detach(), [0] * target.ndim)
                    _copy_overlap(opened.get_slice(name), piece, local, offset)


def _dtype(name: str) -> torch.dtype:
    dtype = _TYPES[name]
    if dtype is None:
        raise ValueError(f"this torch has no {name}")
    return dtype


def copy_own(target: torch.Tensor, whole: torch.Tensor) -> None:
    """Copy a tensor, or of it the slice that lies on this rank, into a target of its shape, sharded or not."""
    local, offset = _local(target) if is_sharded(target) else (target.detach(), [0] * target.ndim)
    local.copy_(whole[tuple(slice(begin, begin + size) for begin, size in zip(offset, local.shape, strict=True))])


def _copy_overlap(saved: Any, piece: _Piece, local: torch.Tensor, offset: Sequence[int]) -> None:
    if local.ndim == 0:
        local.copy_(saved[...])
        return
    begin = [max(a, b) for a, b in zip(piece.begin, offset, strict=True)]
    ends = zip(piece.begin, piece.size, offset, local.shape, strict=True)
    end = [min(a + length, b + own) for a, length, b, own in ends]
    if all(a < b for a, b in zip(begin, end, strict=True)):
        source = tuple(slice(a - o, b - o) for a, b, o in zip(begin, end, piece.begin, strict=True))
        place = tuple(slice(a - o, b - o) for a, b, o in zip(begin, end, offset, strict=True))
        local[place].copy_(saved[source])


def _check(name: str, pieces: list[_Piece]) -> None:
    """Raise `ValueError` unless the pieces fill their tensor once: same shape, inside, no overlap, nothing missing."""
    shape = pieces[0].shape
    total = 0
    for piece in pieces:
        inside = len(piece.begin) == len(piece.size) == len(shape) and all(
            a >= 0 and a + length <= whole for a, length, whole in zip(piece.begin, piece.size, shape, strict=True)
        )
        if piece.shape != shape or not inside:
            raise ValueError(f"the pieces of {name} do not fit together")
        total += torch.Size(piece.size).numel()
    distinct = len({piece.begin for piece in pieces}) == len(pieces)
    if total != torch.Size(shape).numel() or not distinct:
        raise ValueError(f"pieces of {name} are missing")
