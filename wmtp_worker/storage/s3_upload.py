"""Multipart uploads to S3: begun, found again, continued, finished."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import botocore.exceptions

from wmtp_worker.errors import IntegrityError, ObjectNotFound, TransientError
from wmtp_worker.storage.objects import ObjectInfo
from wmtp_worker.storage.s3_checksums import content_md5, crc32c

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from wmtp_worker.storage.s3 import S3Store

DIGEST = "sha256"
_SMALLEST = 5 << 20
_MOST_PARTS = 10_000


class S3Upload:
    """`PartUpload` of one multipart upload. Parts may come in any order and from several threads."""

    def __init__(
        self, store: S3Store, key: str, size: int, sha256: str, part_size: int, upload_id: str, *, begun_by_us: bool
    ) -> None:
        self._store = store
        self._key = key
        self._size = size
        self._sha256 = sha256
        self._part_size = part_size
        self._id = upload_id
        self._begun_by_us = begun_by_us
        # number -> what `complete` has to say of it
        self._parts: dict[int, dict[str, Any]] = {}
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

    def is_of(self, source: Path) -> bool:
        """Whether there are parts, and all of them are this file's."""
        with source.open("rb") as file:
            for number in sorted(self._there):
                file.seek(number * self._part_size)
                if not self.has(number, file.read(self._part_size)):
                    return False
        return bool(self._there)

    def has(self, number: int, data: Buffer) -> bool:
        """See `PartUpload`. A part's ETag is the MD5 of its content (not with KMS: then parts are sent again)."""
        size, etag = self._there.get(number, (-1, ""))
        if size != memoryview(data).nbytes or hashlib.md5(data, usedforsecurity=False).hexdigest() != etag:
            return False
        self._arrived(number, etag, data)
        return True

    def put(self, number: int, data: Buffer) -> None:
        """See `PartUpload`."""
        # boto3 takes no memoryview, and waits for the server's "continue" before it sends a file
        body = data if isinstance(data, bytes | bytearray) else bytes(data)

        def send(checksum: Mapping[str, str]) -> str:
            said = self._store.control.upload_part(**self._names, PartNumber=number + 1, Body=body, **checksum)
            etag: str = said["ETag"]
            return etag.strip('"')

        with self._store.errors("put part of", self._key):
            try:
                etag = self._store.checked(lambda: send(crc32c(body)), lambda: send(content_md5(body)))
            except botocore.exceptions.ClientError as error:
                # another worker has sent the same file, and was first
                if not _is_gone(error) or not self._is_done():
                    raise
                etag = ""
        self._arrived(number, etag, body)

    def _arrived(self, number: int, etag: str, data: Buffer) -> None:
        part = {"PartNumber": number + 1, "ETag": etag, **crc32c(data)}
        with self._lock:
            self._parts[number] = part

    def finish(self) -> ObjectInfo:
        """See `PartUpload`."""
        missing = set(range(-(-self._size // self._part_size))) - set(self._parts)
        where = self._store.where("finish", self._key)
        if missing:
            raise IntegrityError(f"{len(missing)} parts of the upload were not sent", where=where)
        with self._store.errors("finish", self._key):
            if self._done is None:
                try:
                    self._complete()
                except botocore.exceptions.ClientError as error:
                    if not _is_gone(error) or not self._is_done():
                        raise
            if self._done is None:
                self._done = self._checked()
            return self._done

    def _complete(self) -> None:
        parts = [self._parts[number] for number in sorted(self._parts)]
        plain = [{name: part[name] for name in ("PartNumber", "ETag")} for part in parts]

        def complete(told: list[dict[str, Any]]) -> None:
            self._store.control.complete_multipart_upload(**self._names, MultipartUpload={"Parts": told})

        self._store.checked(lambda: complete(parts), lambda: complete(plain))

    def _checked(self) -> ObjectInfo:
        info = self._store.head(self._key)
        if info.sha256 != self._sha256 and not self._begun_by_us and info.size == self._size:
            # found by its key and parts alone: what it says of the whole may be of an older file
            full = self._store.full_key(self._key)
            self._store.copy_version(full, full, info, self._sha256)
            info = self._store.head(self._key)
        return info

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
    store: S3Store, key: str, source: Path, sha256: str, part_size: int, token: Mapping[str, str] | None
) -> S3Upload:
    """The upload of the token, or one found by its key that is of this file, or a new one."""
    size = source.stat().st_size
    smallest = max(_SMALLEST, -(-size // _MOST_PARTS))
    part_size = max(part_size, smallest)
    if token is not None and token.get("sha256") == sha256 and int(token["part_size"]) >= smallest:
        upload = S3Upload(store, key, size, sha256, int(token["part_size"]), token["upload"], begun_by_us=True)
        if upload.look():
            return upload
    for found in _unfinished(store, key):
        upload = S3Upload(store, key, size, sha256, part_size, found, begun_by_us=False)
        if upload.look() and upload.is_of(source):
            return upload
    return S3Upload(store, key, size, sha256, part_size, _create(store, key, sha256), begun_by_us=True)


def _unfinished(store: S3Store, key: str) -> list[str]:
    """Uploads of just that key, the newest first; none where the server, or our rights, do not let us list them."""
    try:
        found = [upload for upload in store.unfinished(key) if upload["Key"] == store.full_key(key)]
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

    made: str = store.checked(lambda: create({"ChecksumAlgorithm": "CRC32C"}), lambda: create({}))
    return made


def _is_gone(error: botocore.exceptions.ClientError) -> bool:
    return error.response.get("Error", {}).get("Code") == "NoSuchUpload"
