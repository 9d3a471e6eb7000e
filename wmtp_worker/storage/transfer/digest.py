"""SHA-256 of files: read through once, or filled out of order by a download."""

import hashlib
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from wmtp_worker.storage.transfer.limits import Heed

if TYPE_CHECKING:
    from typing_extensions import Buffer

_BLOCK = 1 << 20


def hash_descriptor(descriptor: int, size: int, heed: Heed, *, kind: str = "sha256") -> str:
    """Digest (hex) of the first `size` bytes of an open file, in blocks, heeding a stop between them."""
    digest = hashlib.new(kind)
    block = memoryview(bytearray(min(_BLOCK, max(size, 1))))
    offset = 0
    while offset < size:
        got = os.preadv(descriptor, [block[: min(len(block), size - offset)]], offset)
        if not got:
            break
        digest.update(block[:got])
        offset += got
        heed()
    return digest.hexdigest()


def hash_file(path: Path, heed: Heed, *, kind: str = "sha256") -> str:
    """Digest (hex) of a whole file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return hash_descriptor(descriptor, os.fstat(descriptor).st_size, heed, kind=kind)
    finally:
        os.close(descriptor)


class InOrderDigest:
    """Digest of a file of `size` bytes whose parts become ready in any order, by any thread.

    A part that is the next one is taken from memory; the others are read back once their turn comes. One thread hashes
    at a time; the rest go on and leave their parts to it.
    """

    def __init__(self, descriptor: int, size: int, part_size: int, heed: Heed, kind: str = "sha256") -> None:
        self._heed = heed
        self._descriptor = descriptor
        self._size = size
        self._part_size = part_size
        self._digest = hashlib.new(kind)
        self._lock = threading.Lock()
        self._ready: set[int] = set()
        self._next = 0
        self._busy = False
        self._buffer = bytearray(_BLOCK)

    def add(self, number: int, data: "Buffer | None") -> None:
        """Part `number` is in the file now; `data` are its bytes where they are at hand."""
        with self._lock:
            self._ready.add(number)
            if self._busy or self._next not in self._ready:
                return
            self._busy = True
        while True:
            if self._next == number and data is not None:
                self._digest.update(data)
            else:
                self._read_back(self._next)
            with self._lock:
                self._ready.discard(self._next)
                self._next += 1
                if self._next not in self._ready:
                    self._busy = False
                    return

    def hexdigest(self) -> str:
        """The digest, once every part was added."""
        return self._digest.hexdigest()

    def _read_back(self, number: int) -> None:
        offset = number * self._part_size
        end = min(offset + self._part_size, self._size)
        block = memoryview(self._buffer)
        while offset < end:
            got = os.preadv(self._descriptor, [block[: min(len(block), end - offset)]], offset)
            if not got:
                return  # cut short by somebody else: the digest will not fit
            self._digest.update(block[:got])
            offset += got
            self._heed()
