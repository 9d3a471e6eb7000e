"""S3 and what speaks its language: AWS, R2, MinIO, Ceph, B2, SeaweedFS."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import botocore.exceptions
import obstore

from wmtp_worker.errors import (
    ObjectNotFound,
    PreconditionFailed,
    SettingsError,
    StorageError,
    TransientError,
    WorkerError,
)
from wmtp_worker.settings.schema import CloudSettings
from wmtp_worker.storage.keys import check_copy, check_key, check_path
from wmtp_worker.storage.objects import ObjectInfo
from wmtp_worker.storage.s3_checksums import content_md5, crc32c, sendable
from wmtp_worker.storage.s3_client import S3Clients
from wmtp_worker.storage.s3_errors import SDK_ERRORS, no_bucket, refuses_checksum, translated
from wmtp_worker.storage.s3_listing import entries
from wmtp_worker.storage.s3_upload import DIGEST, S3Upload, begin, may_be_ours

if TYPE_CHECKING:
    from typing_extensions import Buffer

# obstore's time-out starts with the request: on a slow line a larger one would be given up on its way
_SMALL = 1 << 20
# S3's limit for a copy in one request
_COPY_AT_ONCE = 5 << 30
_MD5 = re.compile(r"[0-9a-f]{32}")


def open_store(cloud: CloudSettings) -> S3Store:
    """The bucket of these settings, with credentials from AWS's usual chain. Sends nothing yet."""
    if cloud.bucket is None:
        raise SettingsError("no bucket is set", where="cloud.bucket", fix="set CLOUD_BUCKET")
    return S3Store(cloud, cloud.bucket)


class S3Store:
    """`ObjectStore` over an S3 bucket. Versions are ETags, SHA-256 is in the object's metadata."""

    def __init__(self, cloud: CloudSettings, bucket: str) -> None:
        self.bucket = bucket
        self.encryption: dict[str, str] = {}
        if cloud.sse is not None:
            self.encryption["ServerSideEncryption"] = cloud.sse
        if cloud.kms_key is not None:
            self.encryption["SSEKMSKeyId"] = cloud.kms_key
        self._prefix = f"{cloud.prefix}/" if cloud.prefix else ""
        # sha256 until a server refuses it, if it may be something else
        self._checksum = cloud.checksum
        self._clients = S3Clients(cloud, bucket, self.url)

    @property
    def url(self) -> str:
        """`s3://bucket/prefix`."""
        return f"s3://{self.bucket}/{self._prefix}".rstrip("/")

    def __repr__(self) -> str:
        return f"S3Store({self.url!r})"

    @property
    def control(self) -> Any:
        """The botocore client."""
        return self._clients.control

    @property
    def md5(self) -> bool:
        """Whether uploads are checked with Content-MD5 because the server knows no other checksum."""
        return self._checksum == "md5"

    # --- reading ---

    def head(self, key: str) -> ObjectInfo:
        """See `ObjectStore`."""
        with self.errors("head", key):
            try:
                said = self.control.head_object(Bucket=self.bucket, Key=self._prefix + key)
            except botocore.exceptions.ClientError as error:
                raise self._bodiless(error, key) from error
        etag = _bare(said["ETag"])
        digest = said["Metadata"].get(DIGEST)
        # with keys of KMS or the customer's it looks like one too
        plain = said.get("ServerSideEncryption", "AES256") == "AES256" and "SSECustomerAlgorithm" not in said
        md5 = etag if plain and _MD5.fullmatch(etag) else None
        return ObjectInfo(key, said["ContentLength"], etag, digest, md5, said["LastModified"])

    def _bodiless(self, error: botocore.exceptions.ClientError, key: str) -> Exception:
        """The answer to HEAD says nothing but a status: ask in a way that is answered in words."""
        if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
            try:
                self.control.head_bucket(Bucket=self.bucket)
            except botocore.exceptions.ClientError as other:
                if other.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                    return no_bucket(self.bucket, self.where("head", key))
            return ObjectNotFound("there is no such object", where=self.where("head", key))
        try:
            self.control.list_objects_v2(Bucket=self.bucket, Prefix=self._prefix + key, MaxKeys=1)
        except botocore.exceptions.ClientError as other:
            return self.problem(other, "head", key)
        return error

    def list(self, prefix: str = "", after: str = "") -> Iterator[ObjectInfo]:
        """See `ObjectStore`."""
        full_after = self._prefix + after if after else ""
        where = self.where("list", prefix)
        with self.errors("list", prefix):
            for entry in entries(self.control, self.bucket, self._prefix + prefix, full_after, where):
                yield self._listed(entry)

    def _listed(self, entry: Mapping[str, Any]) -> ObjectInfo:
        # whether the ETag is an MD5 depends on each object's encryption, which listings leave out
        key = entry["Key"][len(self._prefix) :]
        return ObjectInfo(key, entry["Size"], _bare(entry["ETag"]), modified=entry["LastModified"])

    def get(
        self, key: str, start: int = 0, length: int | None = None, version: str | None = None
    ) -> tuple[ObjectInfo, Buffer]:
        """See `ObjectStore`."""
        where = self.where("get", key)
        check_key(key, where)
        if length == 0:
            return self._nothing(key, version)
        options: dict[str, Any] = {}
        if version is not None:
            options["if_match"] = f'"{version}"'
        if length is not None:
            options["range"] = (start, start + length)
        elif start:
            options["range"] = {"offset": start}
        try:
            result = obstore.get(self._clients.objects, self._prefix + key, options=options)  # type: ignore[arg-type]
            data = result.bytes()
        except SDK_ERRORS as error:
            if "status code: 416" in str(error):
                return self._nothing(key, version)
            raise self.problem(error, "get", key) from error
        meta, (first, last) = result.meta, result.range
        if len(data) != last - first:
            raise TransientError(f"{len(data)} bytes came of {last - first}", where=where)
        digest = result.attributes.get(DIGEST)
        info = ObjectInfo(key, meta["size"], _bare(meta["e_tag"] or ""), digest, None, meta["last_modified"])
        return info, data

    def _nothing(self, key: str, version: str | None) -> tuple[ObjectInfo, Buffer]:
        """No bytes: a range that S3 would refuse."""
        info = self.head(key)
        if version is not None and info.version != version:
            raise PreconditionFailed("the object is another version", where=self.where("get", key))
        return info, b""

    # --- writing ---

    def put(
        self,
        key: str,
        data: Buffer,
        *,
        if_absent: bool = False,
        if_version: str | None = None,
        sha256: str | None = None,
    ) -> ObjectInfo:
        """See `ObjectStore`."""
        check_key(key, self.where("put", key))
        digest = sha256 or hashlib.sha256(data).hexdigest()
        size = memoryview(data).nbytes
        with self.errors("put", key):
            if if_absent or if_version is not None or size > _SMALL:
                condition = {"IfNoneMatch": "*"} if if_absent else {"IfMatch": f'"{if_version}"'} if if_version else {}
                etag = self._put_with_botocore(key, data, digest, condition)
            else:
                etag = self.checked(
                    lambda: self._put_with_obstore(key, data, digest),
                    lambda: self._put_with_botocore(key, data, digest, {}),
                )
        return ObjectInfo(key, size, etag, digest)

    def _put_with_obstore(self, key: str, data: Buffer, digest: str) -> str:
        result = obstore.put(
            self._clients.objects,
            self._prefix + key,
            memoryview(data),
            attributes={DIGEST: digest},
            use_multipart=False,
        )
        return _bare(result["e_tag"] or "")

    def _put_with_botocore(self, key: str, data: Buffer, digest: str, condition: Mapping[str, str]) -> str:
        body = sendable(data)

        def put(checksum: Mapping[str, str]) -> str:
            said = self.control.put_object(
                Bucket=self.bucket,
                Key=self._prefix + key,
                Body=body,
                Metadata={DIGEST: digest},
                **checksum,
                **condition,
                **self.encryption,
            )
            return _bare(said["ETag"])

        try:
            etag: str = self.checked(lambda: put(crc32c(body)), lambda: put(content_md5(body)))
            return etag
        except botocore.exceptions.ClientError as error:
            missing = error.response.get("Error", {}).get("Code") in ("NoSuchKey", "404")
            if missing and "IfMatch" in condition:
                raise PreconditionFailed("the object is gone", where=self.where("put", key)) from error
            raise

    def checked(self, modern: Callable[[], Any], with_md5: Callable[[], Any]) -> Any:
        """Send with a modern checksum, or with Content-MD5 if that is set, or found to be all the server knows."""
        if self.md5:
            return with_md5()
        try:
            return modern()
        except SDK_ERRORS as error:
            if self._checksum != "auto" or not refuses_checksum(error):
                raise
        result = with_md5()
        self._checksum = "md5"
        return result

    def begin(self, key: str, size: int, sha256: str, part_size: int, token: Mapping[str, str] | None) -> S3Upload:
        """See `ObjectStore`. Without a token an unfinished upload counts only if its parts look like the file's."""
        check_key(key, self.where("begin", key))
        with self.errors("begin", key):
            return begin(self, key, size, sha256, part_size, token)

    def copy(self, source: str, target: str) -> None:
        """See `ObjectStore`. Objects of more than 5 GiB are copied in parts, by the server too."""
        check_copy(source, target, self.where("copy", target))
        info = self._head_for("copy", source)
        with self.errors("copy", source):
            self._copy(self._prefix + source, self._prefix + target, info)

    def _copy(self, source: str, target: str, info: ObjectInfo) -> None:
        origin = {"Bucket": self.bucket, "Key": source}
        if source.endswith("/") and info.size == 0:
            # the marker of a folder, which servers that have real ones do not copy
            self.control.put_object(Bucket=self.bucket, Key=target, Body=b"", **self.encryption)
            return
        if info.size > _COPY_AT_ONCE:
            metadata = {"Metadata": {DIGEST: info.sha256}} if info.sha256 else {}
            # late: it takes a while to import
            from s3transfer.manager import TransferManager

            with TransferManager(self.control) as manager:
                manager.copy(origin, self.bucket, target, {**metadata, **self.encryption}).result()
            return
        self.control.copy_object(
            Bucket=self.bucket,
            Key=target,
            CopySource=origin,
            CopySourceIfMatch=f'"{info.version}"',
            **self.encryption,
        )

    def _head_for(self, operation: str, key: str) -> ObjectInfo:
        try:
            return self.head(key)
        except StorageError as error:
            raise type(error)(error.what, where=self.where(operation, key), fix=error.fix) from error

    def delete(self, key: str, *, if_version: str | None = None) -> None:
        """See `ObjectStore`."""
        # `.` is the bucket's address to some
        check_path(quote(self._prefix + key, safe="", errors="replace"), self.where("delete", key))
        condition = {} if if_version is None else {"IfMatch": f'"{if_version}"'}
        with self.errors("delete", key):
            try:
                self.control.delete_object(Bucket=self.bucket, Key=self._prefix + key, **condition)
            except botocore.exceptions.ClientError as error:
                problem = self.problem(error, "delete", key)
                gone = isinstance(problem, ObjectNotFound)
                if not gone and not (isinstance(problem, PreconditionFailed) and not self._exists(key)):
                    raise problem from error

    def _exists(self, key: str) -> bool:
        try:
            self.head(key)
        except ObjectNotFound:
            return False
        return True

    def sweep(self, prefix: str, older_than: timedelta) -> int:
        """See `ObjectStore`."""
        before = datetime.now(UTC) - older_than
        swept = 0
        with self.errors("sweep", prefix):
            for upload in self.unfinished(prefix):
                if upload["Initiated"] <= before:
                    self.control.abort_multipart_upload(
                        Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                    )
                    swept += 1
        return swept

    def unfinished(self, prefix: str) -> Iterator[Mapping[str, Any]]:
        """Uploads of keys that begin with `prefix`, not finished and not begun by other tools, as S3 lists them."""
        pages = self.control.get_paginator("list_multipart_uploads").paginate(
            Bucket=self.bucket, Prefix=self._prefix + prefix
        )
        for page in pages:
            yield from filter(may_be_ours, page.get("Uploads", ()))

    def full_key(self, key: str) -> str:
        """The key in the bucket."""
        return self._prefix + key

    def close(self) -> None:
        """See `ObjectStore`. Unfinished uploads stay, for another store to go on with."""
        self._clients.close()

    # --- errors ---

    def where(self, operation: str, key: str) -> str:
        """`get s3://bucket/prefix/key`."""
        return f"{operation} {self.url}/{key}" if key else f"{operation} {self.url}"

    @contextmanager
    def errors(self, operation: str, key: str) -> Iterator[None]:
        """Turn what botocore and obstore raise into the worker's own errors."""
        try:
            yield
        except SDK_ERRORS as error:
            raise self.problem(error, operation, key) from error

    def problem(self, error: Exception, operation: str, key: str) -> WorkerError:
        """The worker's error for one of botocore or obstore."""
        return translated(error, self.where(operation, key), self.bucket)


def _bare(etag: str) -> str:
    return etag.strip('"')
