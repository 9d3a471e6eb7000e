"""Azure Blob Storage, through azure-storage-blob.

A version is a blob's ETag. SHA-256 is recorded in the blob's metadata; the MD5 is Azure's own, and missing for blobs
made from blocks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from azure.core import MatchConditions
from azure.core.exceptions import HttpResponseError
from azure.storage.blob import BlobClient, BlobProperties, ContainerClient

from wmtp_worker.errors import BucketNotFound, ObjectNotFound, PreconditionFailed, TransientError, WorkerError
from wmtp_worker.settings.schema import CloudSettings
from wmtp_worker.storage.azure_client import open_client
from wmtp_worker.storage.azure_copy import copy
from wmtp_worker.storage.azure_errors import is_ambiguous, no_container, translate
from wmtp_worker.storage.azure_upload import BlockUpload
from wmtp_worker.storage.keys import check_copy, check_key, check_path
from wmtp_worker.storage.objects import ObjectInfo

if TYPE_CHECKING:
    from typing_extensions import Buffer

_PAGE = 5000
_BEYOND_THE_END = 416


def open_store(cloud: CloudSettings) -> AzureStore:
    """The container `cloud.bucket`; account and credentials come from the environment. Sends nothing.

    Raises `SettingsError` and `AccessDenied`.
    """
    return AzureStore(open_client(cloud), cloud.bucket or "", cloud.prefix, cloud.kms_key)


class AzureStore:
    """`ObjectStore` over a container of Azure Blob Storage."""

    def __init__(self, client: ContainerClient, container: str, prefix: str, scope: str | None) -> None:
        self._client = client
        self._name = container
        self._prefix = f"{prefix}/" if prefix else ""
        self._options: Mapping[str, Any] = {} if scope is None else {"encryption_scope": scope}

    @property
    def url(self) -> str:
        """`az://container/prefix`."""
        return f"az://{self._name}/{self._prefix}".rstrip("/")

    def __repr__(self) -> str:
        return f"AzureStore({self.url!r})"

    def head(self, key: str) -> ObjectInfo:
        """See `ObjectStore`."""
        with self._errors("head", key):
            return _info(key, self._blob(key).get_blob_properties())

    def list(self, prefix: str = "", after: str = "") -> Iterator[ObjectInfo]:
        """See `ObjectStore`. SHA-256 is in it, and MD5 where Azure knows it."""
        with self._errors("list", prefix):
            blobs = self._client.list_blobs(self._prefix + prefix, include=["metadata"], results_per_page=_PAGE)
            for blob in _in_order(blobs):
                key = blob.name.removeprefix(self._prefix)
                # accounts with a hierarchy list their folders too
                if key.encode() > after.encode() and not (blob.metadata or {}).get("hdi_isfolder"):
                    yield _info(key, blob)

    def get(
        self, key: str, start: int = 0, length: int | None = None, version: str | None = None
    ) -> tuple[ObjectInfo, Buffer]:
        """See `ObjectStore`."""
        with self._errors("get", key) as where:
            if length == 0:
                return self._pinned(key, version, where), b""
            check_key(key, where)
            offset = start if start or length is not None else None
            try:
                stream = self._blob(key).download_blob(
                    offset, length, max_concurrency=1, decompress=False, **_condition(version)
                )
            except HttpResponseError as error:
                if error.status_code == _BEYOND_THE_END:
                    return self._pinned(key, version, where), b""
                raise
            data: bytes = stream.readall()
            if len(data) != stream.size:
                raise TransientError(f"{len(data)} of {stream.size} bytes came", where=where)
            properties = stream.properties
            whole = int(str(properties.content_range).rpartition("/")[2])
            return _info(key, properties, whole), data

    def put(
        self,
        key: str,
        data: Buffer,
        *,
        if_absent: bool = False,
        if_version: str | None = None,
        sha256: str | None = None,
    ) -> ObjectInfo:
        """See `ObjectStore`. Azure compares what arrives with the MD5 that is sent along."""
        with self._errors("put", key) as where:
            check_key(key, where)
            body = data if isinstance(data, bytes) else bytes(data)
            digest = sha256 or hashlib.sha256(body).hexdigest()
            made = self._blob(key).upload_blob(
                body,
                length=len(body),
                metadata={"sha256": digest},
                overwrite=not if_absent,
                validate_content=True,
                **_condition(if_version),
                **self._options,
            )
            md5 = _hex(made.get("content_md5"))
            return ObjectInfo(key, len(body), str(made["etag"]), digest, md5, made["last_modified"])

    def begin(self, key: str, size: int, sha256: str, part_size: int, token: Mapping[str, str] | None) -> BlockUpload:
        """See `ObjectStore`. Blocks that are there are found, on whatever machine they were sent."""
        with self._errors("begin", key) as where:
            check_key(key, where)
            upload = BlockUpload(
                self._blob(key),
                key,
                lambda operation: self._errors(operation, key),
                self._options,
                size=size,
                sha256=sha256,
                part_size=part_size,
            )
        with suppress(ObjectNotFound), self._errors("begin", key):
            upload.look()
        return upload

    def copy(self, source: str, target: str) -> None:
        """See `ObjectStore`."""
        with self._errors("copy", source) as where:
            check_copy(source, target, self._where("copy", target))
            copy(self._blob(source), self._blob(target), self._client.credential, self._options, where)

    def delete(self, key: str, *, if_version: str | None = None) -> None:
        """See `ObjectStore`."""
        try:
            with suppress(ObjectNotFound), self._errors("delete", key):
                self._blob(key).delete_blob(**_condition(if_version))
        except PreconditionFailed:
            # an absent blob has no version either
            with suppress(ObjectNotFound):
                self.head(key)
                raise

    def sweep(self, prefix: str, older_than: timedelta) -> int:
        """See `ObjectStore`. Azure throws unfinished uploads away after a week; this only looks at the container."""
        with self._errors("sweep", prefix):
            self._look()
        return 0

    def close(self) -> None:
        """See `ObjectStore`."""
        self._client.close()

    def _blob(self, key: str) -> BlobClient:
        check_path(self._prefix + key, self._where("name", key))
        return self._client.get_blob_client(self._prefix + key)

    def _pinned(self, key: str, version: str | None, where: str) -> ObjectInfo:
        """Facts about a blob of which no bytes were asked for, or none that it has."""
        info = self.head(key)
        if version not in (None, info.version):
            raise PreconditionFailed("somebody else changed the object first", where=where)
        return info

    def _look(self) -> None:
        next(iter(self._client.list_blobs(results_per_page=1)), None)

    # --- errors ---

    def _where(self, operation: str, key: str) -> str:
        return f"{operation} az://{self._name}/{self._prefix}{key}"

    @contextmanager
    def _errors(self, operation: str, key: str) -> Iterator[str]:
        where = self._where(operation, key)
        try:
            yield where
        except WorkerError as error:
            error.where = error.where or where
            raise
        except Exception as error:
            translated = translate(error, where)
            if is_ambiguous(translated) and not self._is_there():
                translated = no_container(self._name, where)
            if translated is error:
                raise
            raise translated from error

    def _is_there(self) -> bool:
        """Whether there is such a container, asked in the way that everybody may ask who may use it."""
        try:
            self._look()
        except Exception as error:
            return not isinstance(translate(error, ""), ObjectNotFound | BucketNotFound)
        return True


def _condition(version: str | None) -> dict[str, Any]:
    return {} if version is None else {"etag": version, "match_condition": MatchConditions.IfNotModified}


def _info(key: str, properties: BlobProperties, size: int | None = None) -> ObjectInfo:
    return ObjectInfo(
        key,
        int(properties.size) if size is None else size,
        _quoted(str(properties.etag)),
        sha256=(properties.metadata or {}).get("sha256"),
        md5=_hex(properties.content_settings.content_md5),
        modified=properties.last_modified,
    )


def _quoted(etag: str) -> str:
    """An ETag as in headers: listings leave out the quotation marks."""
    return etag if etag.startswith('"') else f'"{etag}"'


def _hex(md5: Any) -> str | None:
    return bytes(md5).hex() if md5 else None


def _in_order(blobs: Any) -> Iterator[BlobProperties]:
    """By UTF-8 bytes what is ordered by UTF-16 units, holding back no more than one folder's or name's continuations.

    The two orders differ only where, behind the same beginning, one key has a character beyond U+FFFF.
    """
    held: list[BlobProperties] = []
    beginning = ""
    for blob in blobs:
        if held and not blob.name.startswith(beginning):
            yield from sorted(held, key=_bytes)
            held = []
        if held:
            held.append(blob)
        elif (first := next((at for at, letter in enumerate(blob.name) if letter > "\uffff"), None)) is not None:
            held, beginning = [blob], blob.name[:first]
        else:
            yield blob
    yield from sorted(held, key=_bytes)


def _bytes(blob: BlobProperties) -> bytes:
    return str(blob.name).encode()
