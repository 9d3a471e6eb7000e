"""Large uploads to Azure: blocks, and one commit of their list.

A block's name is made from its number and its content's SHA-256, so any machine sees what is there already. Blocks that
are not committed within a week are thrown away by Azure.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from azure.storage.blob import BlobBlock, BlobClient

from wmtp_worker.storage.objects import ObjectInfo, check_whole

if TYPE_CHECKING:
    from typing_extensions import Buffer

MOST_BLOCKS = 50_000
_NUMBER, _DIGEST = 5, 43  # digits of each in a name; all names of a blob must be as long, and at most 64


class BlockUpload:
    """`PartUpload` by blocks. Parts may come in any order.

    `ObjectNotFound` from `finish` means that another commit of the same blob has thrown our blocks away: begin anew.
    """

    def __init__(
        self,
        blob: BlobClient,
        key: str,
        errors: Callable[[str], AbstractContextManager[str]],
        options: Mapping[str, Any],
        *,
        size: int,
        sha256: str,
        part_size: int,
    ) -> None:
        self._blob = blob
        self._key = key
        self._errors = errors
        self._options = options
        self._size = size
        self._sha256 = sha256
        self._part_size = max(part_size, -(-size // MOST_BLOCKS))
        self._there: set[str] = set()  # names of blocks that Azure has
        self._chosen: dict[int, tuple[str, int]] = {}  # number to name and size
        self._lock = threading.Lock()

    @property
    def part_size(self) -> int:
        """As it was asked for; more where that would be too many blocks."""
        return self._part_size

    @property
    def sequential(self) -> bool:
        """Any order is fine."""
        return False

    @property
    def token(self) -> Mapping[str, str]:
        """Nothing is needed: blocks are found by their names."""
        return {}

    def look(self) -> None:
        """Find the blocks that are there. Raises what any call may; no blob is no blocks."""
        _, uncommitted = self._blob.get_block_list("uncommitted")
        self._there = {str(block.id) for block in uncommitted}

    def has(self, number: int, data: Buffer) -> bool:
        """See `PartUpload`."""
        beginning = f"{number:0{_NUMBER}}"
        if not any(name.startswith(beginning) for name in self._there):
            return False
        name = _name(number, data)
        if name in self._there:
            self._choose(number, name, data)
        return name in self._there

    def put(self, number: int, data: Buffer) -> None:
        """See `PartUpload`. Azure compares what arrives with the MD5 that is sent along."""
        name = _name(number, data)
        body = data if isinstance(data, bytes) else bytes(data)
        with self._errors("put part of"):
            self._blob.stage_block(name, body, length=len(body), validate_content=True, **self._options)
        self._choose(number, name, data)

    def finish(self) -> ObjectInfo:
        """See `PartUpload`."""
        with self._errors("finish") as where:
            check_whole({number: length for number, (_, length) in self._chosen.items()}, self._size, where)
            names = [self._chosen[number][0] for number in sorted(self._chosen)]
            made: dict[str, Any] = self._blob.commit_block_list(
                [BlobBlock(name) for name in names], metadata={"sha256": self._sha256}, **self._options
            )
        return ObjectInfo(self._key, self._size, str(made["etag"]), sha256=self._sha256, modified=made["last_modified"])

    def abort(self) -> None:
        """See `PartUpload`. Azure can only be told to forget blocks by a write of the blob; it does so after a week."""

    def _choose(self, number: int, name: str, data: Buffer) -> None:
        with self._lock:
            self._chosen[number] = (name, memoryview(data).nbytes)


def block_name(number: int, digest: str) -> str:
    """The name of a block whose content has, or comes from what has, that SHA-256."""
    return f"{number:0{_NUMBER}}-{digest[:_DIGEST]}"


def _name(number: int, data: Buffer) -> str:
    return block_name(number, hashlib.sha256(data).hexdigest())
