"""What every bucket can do, whoever runs it: the `ObjectStore` protocol.

A provider makes each call once, with a time-out, and turns whatever goes wrong into one of the errors of
`wmtp_worker.errors`: `ObjectNotFound`, `BucketNotFound`, `AccessDenied`, `PreconditionFailed`, `TransientError`. Trying
again is the business of `retry.RetryingStore`, large files that of `transfer`. All methods may be called from several
threads at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Protocol

from wmtp_worker.errors import IntegrityError

if TYPE_CHECKING:
    from typing_extensions import Buffer


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object. `key` is relative to the store's prefix, `version` opaque (ETag, generation, …).

    `sha256` (hex) is what the uploader recorded, `md5` (hex) what the provider knows; either may be None, in listings
    especially.
    """

    key: str
    size: int
    version: str
    sha256: str | None = None
    md5: str | None = None
    modified: datetime | None = None


class PartUpload(Protocol):
    """A large object on its way in numbered parts (from 0). Nothing of it is visible before `finish`."""

    @property
    def part_size(self) -> int:
        """Bytes of each part but the last; may be larger than was asked for."""

    @property
    def sequential(self) -> bool:
        """Whether parts must be put in order, one after the other."""

    @property
    def token(self) -> Mapping[str, str]:
        """What `begin` needs to go on with this upload in another process. May be a capability: keep it private."""

    def has(self, number: int, data: Buffer) -> bool:
        """Whether the store has this part already, with this content."""

    def put(self, number: int, data: Buffer) -> None:
        """Send one part; sending it again replaces it. The store checks what arrives against a checksum."""

    def finish(self) -> ObjectInfo:
        """Make the object visible, whole, in place of what was there. Atomic.

        Raises `IntegrityError`, with nothing visible, where the parts do not add up to the size that was announced.
        """

    def abort(self) -> None:
        """Throw away all parts. No error where there is nothing to throw away."""


class ObjectStore(Protocol):
    """A bucket, or the part of it under a prefix. Keys are relative to the prefix and use `/`."""

    @property
    def url(self) -> str:
        """`s3://bucket/prefix` and the like, for messages: nothing secret in it."""

    def head(self, key: str) -> ObjectInfo:
        """Facts about one object, with `sha256` where it was recorded. Raises `ObjectNotFound`."""

    def list(self, prefix: str = "", after: str = "") -> Iterator[ObjectInfo]:
        """Every object whose key begins with `prefix` and sorts behind `after`, page by page.

        Ascending by the key's UTF-8 bytes.

        An empty result means that the bucket was read and nothing is there: a missing bucket raises `BucketNotFound`, a
        refusal `AccessDenied`.
        """

    def get(
        self, key: str, start: int = 0, length: int | None = None, version: str | None = None
    ) -> tuple[ObjectInfo, Buffer]:
        """Bytes `start` to `start + length` (None: to the end) of one object, which must still be `version`.

        `size` of the info is that of the whole object. A range that goes past the end gives what there is, perhaps
        nothing. Raises `ObjectNotFound`; `PreconditionFailed` where the object
        has another version; `TransientError` where fewer bytes came than the store announced.
        """

    def put(
        self,
        key: str,
        data: Buffer,
        *,
        if_absent: bool = False,
        if_version: str | None = None,
        sha256: str | None = None,
    ) -> ObjectInfo:
        """Write a small object and record its SHA-256 (computed unless given).

        Atomic: readers see the old object or the new one. With `if_absent` of all racing writers one wins; with
        `if_version` only who knows the newest version does; the others get `PreconditionFailed`. The store checks
        what arrives.
        """

    def begin(self, key: str, size: int, sha256: str, part_size: int, token: Mapping[str, str] | None) -> PartUpload:
        """Begin a large upload of `size` bytes with that digest, or go on with the unfinished one of `token`.

        Without a token, an unfinished upload of the same key is found and continued where the provider can list such,
        on whatever machine it was begun. Parts count only if their content matches (`PartUpload.has`).
        """

    def copy(self, source: str, target: str) -> None:
        """Copy within the bucket, without the bytes passing through here; SHA-256 and all. Raises `ObjectNotFound`."""

    def delete(self, key: str, *, if_version: str | None = None) -> None:
        """Delete one object; none there is no error. With `if_version`: `PreconditionFailed` if there is another."""

    def sweep(self, prefix: str, older_than: timedelta) -> int:
        """Abort uploads of keys under `prefix` that were begun longer ago and never finished; returns how many.

        0 where the provider throws such away by itself.
        """

    def close(self) -> None:
        """Give back connections. Nothing else may be called afterwards."""


def check_whole(lengths: Mapping[int, int], size: int, where: str | None = None) -> None:
    """Raise `IntegrityError` unless the parts, number to bytes, follow one another and add up to `size`."""
    arrived = sum(lengths.values())
    if arrived != size or any(number not in lengths for number in range(len(lengths))):
        what = f"the upload lacks a part, or has one that is not its own: {arrived} of {size} bytes were sent"
        raise IntegrityError(what, where=where, fix="upload the file again")
