"""Google Cloud Storage, through google-cloud-storage.

A version is an object's generation. SHA-256 is recorded in the object's custom metadata, which downloads do not carry:
`get` leaves it out, `head` and `list` have it. Downloads go through the SDK's authorized session itself, because its
download classes keep the object's size to themselves.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

import google_crc32c
import requests
from google.api_core.exceptions import from_http_response
from google.auth.transport.requests import AuthorizedSession
from google.cloud import storage  # type: ignore[import-untyped]

from wmtp_worker.errors import (
    BucketNotFound,
    ObjectNotFound,
    PreconditionFailed,
    SettingsError,
    TransientError,
    WorkerError,
)
from wmtp_worker.settings.checks import is_loopback
from wmtp_worker.settings.schema import CloudSettings
from wmtp_worker.storage.gcs_credentials import find_credentials
from wmtp_worker.storage.gcs_errors import is_ambiguous, no_bucket, translate
from wmtp_worker.storage.gcs_upload import ResumableUpload
from wmtp_worker.storage.http import TIMEOUT, prepare_session
from wmtp_worker.storage.keys import check_copy, check_key, check_path
from wmtp_worker.storage.objects import ObjectInfo

if TYPE_CHECKING:
    from typing_extensions import Buffer

_ENDPOINT = "https://storage.googleapis.com"
_BINARY = "application/octet-stream"
_LISTED = "items(name,size,generation,md5Hash,metadata,updated),nextPageToken"
_PAGE = 1000
# one attempt: trying again is not the provider's business
_ONCE: Mapping[str, Any] = {"retry": None, "timeout": TIMEOUT}
_BEYOND_THE_END = 416


def open_store(cloud: CloudSettings) -> GcsStore:
    """The bucket `cloud.bucket`; credentials come from the environment.

    Nothing is sent, except that a machine without credentials in its environment is asked for its service account.
    Raises `SettingsError` and `AccessDenied`.
    """
    if cloud.bucket is None:
        raise SettingsError("no bucket is set", where="cloud.bucket", fix="set CLOUD_BUCKET")
    endpoint = _endpoint(cloud)
    # or the SDK asks for the bucket's metadata, in threads of its own
    os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
    # at their lowest levels Google's packages log requests
    logging.getLogger("google").setLevel(logging.WARNING)
    session = AuthorizedSession(find_credentials(endpoint, f"open gs://{cloud.bucket}"))
    prepare_session(session, endpoint, cloud.concurrency)
    session.hooks["response"].append(_read_refusal)
    return GcsStore(cloud.bucket, cloud.prefix, endpoint, session, cloud.kms_key)


def _endpoint(cloud: CloudSettings) -> str:
    emulator = os.environ.get("STORAGE_EMULATOR_HOST")
    endpoint = cloud.endpoint_url or emulator or _ENDPOINT
    if "://" not in endpoint:
        endpoint = f"http://{endpoint}"  # as Google's own libraries read STORAGE_EMULATOR_HOST
    parts = urlsplit(endpoint)
    if parts.scheme == "http" and not is_loopback(parts.hostname or "") and not cloud.allow_http:
        fix = "use https://, or set cloud.allow_http=true if the network between is yours"
        raise SettingsError(f"{parts.hostname} is to be used without TLS", where="STORAGE_EMULATOR_HOST", fix=fix)
    return endpoint.rstrip("/")


class GcsStore:
    """`ObjectStore` over a bucket of Google Cloud Storage, or of a server that speaks its JSON API."""

    def __init__(
        self, bucket: str, prefix: str, endpoint: str, session: AuthorizedSession, kms_key: str | None
    ) -> None:
        self._name = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._endpoint = endpoint
        self._session = session
        self._kms_key = kms_key
        self._client = storage.Client(
            project=None, credentials=session.credentials, _http=session, client_options={"api_endpoint": endpoint}
        )
        self._bucket = self._client.bucket(bucket)
        self._media = f"{endpoint}/download/storage/v1/b/{quote(bucket, safe='')}/o/"

    @property
    def url(self) -> str:
        """`gs://bucket/prefix`."""
        return f"gs://{self._name}/{self._prefix}".rstrip("/")

    def __repr__(self) -> str:
        return f"GcsStore({self.url!r})"

    def head(self, key: str) -> ObjectInfo:
        """See `ObjectStore`."""
        with self._errors("head", key):
            blob = self._blob(key)
            blob.reload(**_ONCE)
            return self._info(blob)

    def list(self, prefix: str = "", after: str = "") -> Iterator[ObjectInfo]:
        """See `ObjectStore`. SHA-256 and MD5 are in it."""
        start = self._prefix + after if after else None
        with self._errors("list", prefix):
            listing = self._client.list_blobs(
                self._bucket, prefix=self._prefix + prefix, start_offset=start, fields=_LISTED, page_size=_PAGE, **_ONCE
            )
            # the SDK's objects for them cost more than the listing itself
            for page in listing.pages:
                for resource in page.raw_page.get("items", ()):
                    if resource["name"] != start:
                        yield _info_of_resource(resource["name"].removeprefix(self._prefix), resource)

    def get(
        self, key: str, start: int = 0, length: int | None = None, version: str | None = None
    ) -> tuple[ObjectInfo, Buffer]:
        """See `ObjectStore`. A whole object is compared with the checksum that comes with it: `TransientError`."""
        with self._errors("get", key) as where:
            name = self._object(key)
            check_key(key, where)
            # gzip is accepted so that what was stored compressed comes as it was stored
            headers = {"Accept-Encoding": "gzip"}
            if start or length is not None:
                headers["Range"] = f"bytes={start}-" + ("" if length is None else str(start + max(1, length) - 1))
            params = {"alt": "media", **({} if version is None else {"ifGenerationMatch": version})}
            address = self._media + quote(name.encode(), safe="~")
            with self._session.get(address, params=params, headers=headers, timeout=TIMEOUT, stream=True) as answer:
                if answer.status_code == _BEYOND_THE_END:
                    return self._pinned(key, version, where), b""
                if answer.status_code not in (200, 206):
                    raise from_http_response(answer)
                data: bytes = answer.raw.read(decode_content=False)
            checksum = re.search(r"crc32c=([^,\s]+)", answer.headers.get("X-Goog-Hash", ""))
            if answer.status_code == 200 and checksum and checksum[1] != _crc32c(data):
                raise TransientError("the bytes changed on the way", where=where)
            if answer.status_code == 200:  # also what a server answers that ignores ranges
                data = data[start:]
            return _info_of_answer(key, answer), data if length is None else data[:length]

    def put(
        self,
        key: str,
        data: Buffer,
        *,
        if_absent: bool = False,
        if_version: str | None = None,
        sha256: str | None = None,
    ) -> ObjectInfo:
        """See `ObjectStore`. The server compares what arrives with the CRC32C that is sent along."""
        with self._errors("put", key) as where:
            body = data if isinstance(data, bytes) else bytes(data)
            digest = sha256 or hashlib.sha256(body).hexdigest()
            check_key(key, where)
            blob = self._blob(key, digest)
            generation = 0 if if_absent else _generation(if_version, where)
            blob.upload_from_string(
                body, content_type=_BINARY, if_generation_match=generation, checksum="crc32c", **_ONCE
            )
            return self._info(blob)

    def begin(
        self, key: str, size: int, sha256: str, part_size: int, token: Mapping[str, str] | None
    ) -> ResumableUpload:
        """See `ObjectStore`. Google does not list unfinished uploads: without a token it is a new one."""
        check_key(key, self._where("begin", key))

        def upload(uri: str) -> ResumableUpload:
            return ResumableUpload(
                self._session,
                uri,
                lambda operation: self._errors(operation, key),
                lambda resource: _info_of_resource(key, resource),
                size=size,
                sha256=sha256,
                part_size=part_size,
            )

        if token and token.get("sha256") == sha256 and self._is_ours(token.get("session", "")):
            with suppress(ObjectNotFound):
                unfinished = upload(token["session"])
                unfinished.look()
                return unfinished
        with self._errors("begin", key):
            blob = self._blob(key, sha256)
            return upload(blob.create_resumable_upload_session(content_type=_BINARY, checksum=None, **_ONCE))

    def copy(self, source: str, target: str) -> None:
        """See `ObjectStore`."""
        with self._errors("copy", source):
            check_copy(source, target, self._where("copy", target))
            old, new = self._blob(source), self._blob(target)
            token, _, _ = new.rewrite(old, **_ONCE)
            while token is not None:
                token, _, _ = new.rewrite(old, token=token, **_ONCE)

    def delete(self, key: str, *, if_version: str | None = None) -> None:
        """See `ObjectStore`."""
        try:
            with suppress(ObjectNotFound), self._errors("delete", key) as where:
                self._blob(key).delete(if_generation_match=_generation(if_version, where), **_ONCE)
        except PreconditionFailed:
            # an absent object has no generation either
            with suppress(ObjectNotFound):
                self.head(key)
                raise

    def sweep(self, prefix: str, older_than: timedelta) -> int:
        """See `ObjectStore`. Google throws unfinished uploads away after a week; this only looks at the bucket."""
        with self._errors("sweep", prefix):
            self._look()
        return 0

    def close(self) -> None:
        """See `ObjectStore`."""
        self._client.close()

    # --- names and answers ---

    def _object(self, key: str) -> str:
        """The whole name, which is one part of an address: `..` would be the bucket's."""
        check_path(quote(self._prefix + key, safe="", errors="replace"), self._where("name", key))
        return self._prefix + key

    def _blob(self, key: str, sha256: str | None = None) -> storage.Blob:
        blob = self._bucket.blob(self._object(key), kms_key_name=self._kms_key)
        if sha256 is not None:
            blob.metadata = {"sha256": sha256}
        return blob

    def _info(self, blob: storage.Blob) -> ObjectInfo:
        return ObjectInfo(
            blob.name.removeprefix(self._prefix),
            int(blob.size or 0),
            str(blob.generation),
            sha256=(blob.metadata or {}).get("sha256"),
            md5=base64.b64decode(blob.md5_hash).hex() if blob.md5_hash else None,
            modified=blob.updated,
        )

    def _pinned(self, key: str, version: str | None, where: str) -> ObjectInfo:
        """Facts about an object of which no bytes were asked for, or none that it has."""
        info = self.head(key)
        if version not in (None, info.version):
            raise PreconditionFailed("somebody else changed the object first", where=where)
        return info

    def _is_ours(self, session: str) -> bool:
        """Whether an upload's address is one of our server's: it gets our credentials."""
        return urlsplit(session)[:2] == urlsplit(self._endpoint)[:2]

    # --- errors ---

    def _where(self, operation: str, key: str) -> str:
        return f"{operation} gs://{self._name}/{self._prefix}{key}"

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
                translated = no_bucket(self._name, where)
            if translated is error:
                raise
            raise translated from error

    def _is_there(self) -> bool:
        """Whether there is such a bucket, asked in the way that everybody may ask who may use it."""
        try:
            self._look()
        except Exception as error:
            return not isinstance(translate(error, ""), ObjectNotFound | BucketNotFound)
        return True

    def _look(self) -> None:
        next(iter(self._client.list_blobs(self._bucket, max_results=1, fields="items(name)", **_ONCE)), None)


def _read_refusal(answer: requests.Response, **_: Any) -> None:
    """Or the connection of a download that is tried again with a new token would be lost."""
    if answer.status_code >= 400:
        answer.content  # noqa: B018


def _generation(version: str | None, where: str) -> int | None:
    if version is None:
        return None
    if not version.isdecimal():  # of another provider
        raise PreconditionFailed("somebody else changed the object first", where=where)
    return int(version)


def _crc32c(data: bytes) -> str:
    return base64.b64encode(google_crc32c.value(data).to_bytes(4, "big")).decode()


def _info_of_answer(key: str, answer: requests.Response) -> ObjectInfo:
    headers = answer.headers
    whole = headers.get("Content-Range", "").rpartition("/")[2] or headers.get("X-Goog-Stored-Content-Length")
    md5 = re.search(r"md5=([^,\s]+)", headers.get("X-Goog-Hash", ""))
    return ObjectInfo(
        key,
        int(whole or headers["Content-Length"]),
        headers["X-Goog-Generation"],
        sha256=headers.get("X-Goog-Meta-Sha256"),
        md5=base64.b64decode(md5[1]).hex() if md5 else None,
        modified=_date(headers.get("Last-Modified")),
    )


def _info_of_resource(key: str, resource: Mapping[str, Any]) -> ObjectInfo:
    return ObjectInfo(
        key,
        int(resource["size"]),
        str(resource["generation"]),
        sha256=resource.get("metadata", {}).get("sha256"),
        md5=base64.b64decode(resource["md5Hash"]).hex() if "md5Hash" in resource else None,
        modified=datetime.fromisoformat(resource["updated"]) if "updated" in resource else None,
    )


def _date(text: str | None) -> datetime | None:
    return parsedate_to_datetime(text) if text else None
