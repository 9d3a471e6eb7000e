"""Multipart uploads to S3: begun, found again, continued, finished."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import botocore.exceptions

from wmtp_worker.errors import ObjectNotFound, TransientError
from wmtp_worker.storage.objects import ObjectInfo, check_whole
from wmtp_worker.storage.s3_checksums import content_md5, crc32c, sendable

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from wmtp_worker.storage.s3 import S3Store

DIGEST = "sha256"
_SMALLEST = 5 << 20
_MOST_PARTS = 10_000
_CHECKSUM, _COMPOSITE = "CRC32C", "COMPOSITE"


class S3Upload:
    """`PartUpload` of one multipart upload. Parts may come in any order and from several threads."""

    def __init__(self, store: S3Store, key: str, size: int, sha256: str, part_size: int, upload_id: str) -> None:
        self._store = store
        self._key = key
        self._size = size
        self._sha256 = sha256
        self._part_size = part_size
        self._id = upload_id
        # number -> what `complete` has to say of it, and its length
        self._parts: dict[int, dict[str, Any]] = {}
        self._lengths: dict[int, int] = {}
        # number -> size and ETag, of parts that were there
        self._there: dict[int, tuple[int, str]] = {}
        self._lock = threading.Lock()
        self._done: ObjectInfo | None = None

    @property
    def part_size(self) -> int:
        """At least 5 MiB, and enough for 10,000 parts."""
        return self._part_size

    @property
    def sequential(self) -> bool:
        """Any order is fine."""
        return False

    @property
    def token(self) -> Mapping[str, str]:
        """Good for nothing without credentials."""
        return {"upload": self._id, "sha256": self._sha256, "part_size": str(self._part_size)}

    @property
    def _names(self) -> dict[str, Any]:
        return {"Bucket": self._store.bucket, "Key": self._store.full_key(self._key), "UploadId": self._id}

    def look(self) -> bool:
        """Learn which parts are there; whether the upload still is."""
        try:
            for page in self._store.control.get_paginator("list_parts").paginate(**self._names):
                for part in page.get("Parts", ()):
                    self._there[part["PartNumber"] - 1] = (part["Size"], part["ETag"].strip('"'))
        except botocore.exceptions.ClientError as error:
            # gone, or not ours to look at
            if isinstance(self._store.problem(error, "begin", self._key), TransientError):
                raise
            return False
        return True

    def looks_like_ours(self) -> bool:
        """Whether there are parts, of just the lengths that the parts of this content have; see `_fingerprint`."""
        lengths = [size for size, _ in self._there.values()]
        expected = [min(self._part_size, self._size - number * self._part_size) for number in self._there]
        return self._part_size in lengths and lengths == expected

    def has(self, number: int, data: Buffer) -> bool:
        """See `PartUpload`. A part's ETag is the MD5 of its content (not with KMS: then parts are sent again)."""
        size, etag = self._there.get(number, (-1, ""))
        if size != memoryview(data).nbytes or hashlib.md5(data, usedforsecurity=False).hexdigest() != etag:
            return False
        self._arrived(number, etag, size, crc32c(data))
        return True

    def put(self, number: int, data: Buffer) -> None:
        """See `PartUpload`."""
        body = sendable(data)
        checksum = crc32c(body)

        def send(checksum: Mapping[str, str]) -> str:
            said = self._store.control.upload_part(**self._names, PartNumber=number + 1, Body=body, **checksum)
            etag: str = said["ETag"]
            return etag.strip('"')

        with self._store.errors("put part of", self._key):
            try:
                etag = self._store.checked(lambda: send(checksum), lambda: send(content_md5(body)))
            except botocore.exceptions.ClientError as error:
                # another worker has sent the same file, and was first
                if not _is_gone(error) or not self._is_done():
                    raise
                etag = ""
        self._arrived(number, etag, len(body), checksum)

    def _arrived(self, number: int, etag: str, size: int, checksum: Mapping[str, str]) -> None:
        part = {"PartNumber": number + 1, "ETag": etag, **checksum}
        with self._lock:
            self._parts[number] = part
            self._lengths[number] = size

    def finish(self) -> ObjectInfo:
        """See `PartUpload`."""
        check_whole(self._lengths, self._size, self._store.where("finish", self._key))
        with self._store.errors("finish", self._key):
            if self._done is None:
                try:
                    self._complete()
                except botocore.exceptions.ClientError as error:
                    if not _is_gone(error) or not self._is_done():
                        raise
            if self._done is None:
                self._done = self._store.head(self._key)
            return self._done

    def _complete(self) -> None:
        parts = [self._parts[number] for number in sorted(self._parts)]
        plain = [{name: part[name] for name in ("PartNumber", "ETag")} for part in parts]

        def complete(told: list[dict[str, Any]]) -> None:
            self._store.control.complete_multipart_upload(**self._names, MultipartUpload={"Parts": told})

        self._store.checked(lambda: complete(parts), lambda: complete(plain))

    def _is_done(self) -> bool:
        try:
            info = self._store.head(self._key)
        except ObjectNotFound:
            return False
        if info.sha256 == self._sha256:
            self._done = info
        return self._done is not None

    def abort(self) -> None:
        """See `PartUpload`."""
        with self._store.errors("abort", self._key):
            try:
                self._store.control.abort_multipart_upload(**self._names)
            except botocore.exceptions.ClientError as error:
                if not _is_gone(error):
                    raise


def begin(
    store: S3Store, key: str, size: int, sha256: str, part_size: int, token: Mapping[str, str] | None
) -> S3Upload:
    """The upload of the token, or one found by its key that looks like ours, or a new one."""
    smallest = max(_SMALLEST, -(-size // _MOST_PARTS))
    part_size = max(part_size, smallest) + _fingerprint(sha256)
    if token is not None and token.get("sha256") == sha256 and int(token["part_size"]) >= smallest:
        upload = S3Upload(store, key, size, sha256, int(token["part_size"]), token["upload"])
        if upload.look():
            return upload
    for found in _unfinished(store, key):
        upload = S3Upload(store, key, size, sha256, part_size, found)
        if upload.look() and upload.looks_like_ours():
            return upload
    return S3Upload(store, key, size, sha256, part_size, _create(store, key, sha256))


def may_be_ours(upload: Mapping[str, Any]) -> bool:
    """Whether an unfinished upload was begun for checksums as ours are, as far as the server says."""
    algorithm = upload.get("ChecksumAlgorithm")
    return algorithm is None or (algorithm == _CHECKSUM and upload.get("ChecksumType", _COMPOSITE) == _COMPOSITE)


def _fingerprint(sha256: str) -> int:
    """Bytes, up to 1 MiB, that parts of this content are longer than they had to be.

    S3 lists the parts of an unfinished upload with their lengths, but nothing that whoever began it could have written
    down: this is how another machine knows the upload of the same content, and leaves all others alone.
    """
    return 1 + int(sha256[:5], 16)


def _unfinished(store: S3Store, key: str) -> list[str]:
    """Uploads of just that key that may be ours, the newest first; none where we are not allowed to list them."""
    try:
        found = [upload for upload in store.unfinished(key) if upload["Key"] == store.full_key(key)]
        # a server refuses parts without the checksum that was announced
        found = [upload for upload in found if not (store.md5 and "ChecksumAlgorithm" in upload)]
    except botocore.exceptions.ClientError as error:
        if isinstance(store.problem(error, "begin", key), TransientError):
            raise
        return []
    return [upload["UploadId"] for upload in sorted(found, key=lambda one: one["Initiated"], reverse=True)]


def _create(store: S3Store, key: str, sha256: str) -> str:
    def create(checksum: Mapping[str, str]) -> str:
        said = store.control.create_multipart_upload(
            Bucket=store.bucket, Key=store.full_key(key), Metadata={DIGEST: sha256}, **checksum, **store.encryption
        )
        upload_id: str = said["UploadId"]
        return upload_id

    made: str = store.checked(lambda: create({"ChecksumAlgorithm": _CHECKSUM}), lambda: create({}))
    return made


def _is_gone(error: botocore.exceptions.ClientError) -> bool:
    return error.response.get("Error", {}).get("Code") == "NoSuchUpload"
