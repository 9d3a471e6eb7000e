"""The bytes of a safetensors file, laid out before they are there.

The format (https://huggingface.co/docs/safetensors/index#format): 8 bytes, little-endian, the header's length; the
header, JSON, padded with spaces; the tensors' bytes without gaps. Tensors are ordered by
the size of their elements, largest first, so that each one is aligned, then by dtype and name. We lay files out
ourselves because the stock serialiser copies every byte while it holds the GIL, which stops the training for as long.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import _TYPES

from wmtp_worker.storage.seal import FileEntry, file_entry

# measured: smaller and larger ones are slower, and so is a second thread for the hash of one file
BLOCK = 8 << 20
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_ALIGNMENT = 8

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Layout:
    """Where each tensor lies in one file: `offsets` in bytes from the file's beginning, in the file's order."""

    header: bytes  # with the 8 bytes of its length
    offsets: Mapping[str, int]
    nbytes: int


def signature(tensors: Tensors, metadata: Mapping[str, str]) -> object:
    """Equal for two sets of tensors that have the same layout, in whatever order they are given."""
    return {name: (value.dtype, value.shape) for name, value in tensors.items()}, dict(metadata)


def lay_out(tensors: Tensors, metadata: Mapping[str, str]) -> Layout:
    """The layout for tensors of these names, shapes and dtypes. `metadata` goes into the header's `__metadata__`."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), _NAMES[tensors[name].dtype], name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    ends, end = {}, 0
    for name in order:
        value = tensors[name]
        begin, end = end, end + value.numel() * value.element_size()
        header[name] = {"dtype": _NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [begin, end]}
        ends[name] = begin
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    first = 8 + len(text)
    offsets = {name: first + begin for name, begin in ends.items()}
    return Layout(struct.pack("<Q", len(text)) + text, offsets, first + end)


class Source(Protocol):
    """A file's content before it is written."""

    @property
    def nbytes(self) -> int: ...

    def blocks(self) -> Iterator[memoryview]:
        """Its bytes in order, in blocks of at most `BLOCK`, each valid until the next is asked for."""


@dataclass(frozen=True)
class LiveFile:
    """A file whose tensors are read where they are, so nobody may change them until it is written.

    Tensors on a device come to the host one at a time.
    """

    tensors: Tensors
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return lay_out(self.tensors, self.metadata).nbytes

    def blocks(self) -> Iterator[memoryview]:
        layout = lay_out(self.tensors, self.metadata)
        yield memoryview(layout.header)
        for name in layout.offsets:
            yield from in_blocks(_host_bytes(self.tensors[name]))


def in_blocks(data: memoryview) -> Iterator[memoryview]:
    for offset in range(0, len(data), BLOCK):
        yield data[offset : offset + BLOCK]


def _host_bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def write_file(path: Path, source: Source, heed: Callable[[int], object]) -> FileEntry:
    """Write, sync and hash a new file. Hashing and writing let go of the GIL.

    `heed` is called with the size of each block, before it; what it raises ends the writing. Whatever ends it leaves a
    part of the file. Raises `OSError`.
    """
    digest = hashlib.sha256()
    size = 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        for block in source.blocks():
            heed(len(block))
            digest.update(block)
            size += len(block)
            _write_all(descriptor, block)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return FileEntry(size=size, sha256=digest.hexdigest())


def read_file(path: Path, heed: Callable[[int], object]) -> tuple[FileEntry, dict[str, torch.Tensor] | None]:
    """What a manifest says of a file, and its tensors on the CPU, each in memory of its own: in one pass.

    The content is as good as its digest, which the caller compares. None where this is no safetensors file, or none
    like ours. A second thread hashes what was read. `heed` is called with the size of each block that was read; what it
    raises ends the reading. Raises `OSError`, and torch's `RuntimeError` where there is no memory.
    """
    digest = hashlib.sha256()
    size = 0
    hasher = ThreadPoolExecutor(1, "hash")
    with path.open("rb", buffering=0) as file:

        def take(target: memoryview) -> bool:
            """Fill it from the file; whether there was as much."""
            nonlocal size
            for block in in_blocks(target):
                filled = 0
                while filled < len(block) and (count := file.readinto(block[filled:])):
                    filled += count
                heed(filled)
                size += filled
                hasher.submit(digest.update, block[:filled])  # nobody changes it any more
                if filled < len(block):
                    return False
            return True

        try:
            tensors = _read_tensors(take, os.fstat(file.fileno()).st_size)
        except BaseException:
            hasher.shutdown(wait=False, cancel_futures=True)
            raise
    hasher.shutdown()
    if tensors is None:
        return file_entry(path, heed), None
    return FileEntry(size=size, sha256=digest.hexdigest()), tensors


def _read_tensors(take: Callable[[memoryview], bool], size: int) -> dict[str, torch.Tensor] | None:
    head = bytearray(8)
    if not take(memoryview(head)):
        return None
    length = int.from_bytes(head, "little")
    if length > size - 8:
        return None
    text = bytearray(length)
    if not take(memoryview(text)):
        return None
    # nothing is allocated before the header is known to describe exactly the bytes that follow
    specs = _specs(bytes(text), size - 8 - length)
    if specs is None:
        return None
    tensors = {}
    for name, dtype, shape in specs:
        tensors[name] = torch.empty(shape, dtype=dtype)
        if tensors[name].numel() and not take(_host_bytes(tensors[name])):
            return None
    return tensors


def _specs(text: bytes, size: int) -> list[tuple[str, torch.dtype, list[int]]] | None:
    """Name, dtype and shape of each tensor, in the file's order; None unless they fill `size` bytes without gaps."""
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        found = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        specs, end = [], 0
        for name, spec in found:
            dtype, shape = _TYPES[spec["dtype"]], spec["shape"]
            if dtype is None or not all(isinstance(length, int) and length >= 0 for length in shape):
                return None
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            if spec["data_offsets"] != [begin, end]:
                return None
            specs.append((name, dtype, shape))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return specs if end == size else None


def digest_of(source: Source) -> FileEntry:
    """Size and SHA-256 of the file, without writing it."""
    digest = hashlib.sha256()
    size = 0
    for block in source.blocks():
        digest.update(block)
        size += len(block)
    return FileEntry(size=size, sha256=digest.hexdigest())


def _write_all(descriptor: int, block: memoryview) -> None:
    while block:
        block = block[os.write(descriptor, block) :]
