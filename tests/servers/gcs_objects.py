"""What the GCS test server keeps: buckets, objects with generations, and unfinished resumable uploads.

Written from the public documentation of the JSON API (request preconditions, resumable uploads, hashes and ETags).
Nothing here knows HTTP but its status codes.
"""

import base64
import hashlib
import re
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import google_crc32c

QUANTUM = 256 << 10  # resumable uploads are persisted in multiples of this
LARGEST_PAGE = 1000

Resource = dict[str, Any]


class Refusal(Exception):
    """An answer that is an error: HTTP status, the reason Google's clients look at, and a message."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status, self.reason, self.message = status, reason, message


def not_found(bucket: str, name: str) -> Refusal:
    return Refusal(404, "notFound", f"No such object: {bucket}/{name}")


def md5_of(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def crc32c_of(data: bytes) -> str:
    return base64.b64encode(google_crc32c.value(data).to_bytes(4, "big")).decode()


@dataclass(frozen=True)
class Stored:
    """One object: its bytes and its resource, as the API shows it."""

    data: bytes
    resource: Resource

    @property
    def generation(self) -> int:
        return int(self.resource["generation"])


@dataclass
class Session:
    """One resumable upload. `done` is the resource of the object once it is finished."""

    bucket: str
    metadata: Resource
    conditions: Mapping[str, str]
    total: int | None
    received: bytearray = field(default_factory=bytearray)
    done: Resource | None = None


def check_hashes(data: bytes, announced: Mapping[str, Any]) -> None:
    """400 where `announced` has an md5Hash or crc32c that is not that of the data."""
    for name, label, actual in (("md5Hash", "MD5 hash", md5_of), ("crc32c", "CRC32C", crc32c_of)):
        expected = announced.get(name)
        if expected and expected != actual(data):
            message = f'Provided {label} "{expected}" doesn\'t match calculated {label} "{actual(data)}".'
            raise Refusal(400, "invalid", message)


def check_conditions(query: Mapping[str, str], current: Stored | None, *, reading: bool = False) -> None:
    """The four generation and metageneration preconditions; an absent object is generation 0.

    412 where one does not hold; a read whose "not match" does not hold is 304.
    """
    facts = {
        "Generation": current.generation if current else 0,
        "Metageneration": int(current.resource["metageneration"]) if current else 0,
    }
    for kind, actual in facts.items():
        wanted = query.get(f"if{kind}Match")
        if wanted is not None and int(wanted) != actual:
            raise Refusal(412, "conditionNotMet", "At least one of the pre-conditions you specified did not hold.")
        unwanted = query.get(f"if{kind}NotMatch")
        if unwanted is not None and int(unwanted) == actual:
            if reading:
                raise Refusal(304, "notModified", "")
            raise Refusal(412, "conditionNotMet", "At least one of the pre-conditions you specified did not hold.")


class Storage:
    """All state, under one lock: every method is atomic."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.buckets: dict[str, dict[str, Stored]] = {}
        self.sessions: dict[str, Session] = {}
        self.expired: set[str] = set()  # sessions that answer 410
        self.page = LARGEST_PAGE
        self.rewrite_calls = 1  # how many calls one rewrite takes
        self._rewrites: dict[str, int] = {}
        self._generation = 0

    def make_bucket(self, name: str) -> Resource:
        with self.lock:
            if name in self.buckets:
                raise Refusal(409, "conflict", "Your previous request to create the named bucket succeeded.")
            self.buckets[name] = {}
            return self.bucket_resource(name)

    def bucket_resource(self, name: str) -> Resource:
        with self.lock:
            self.bucket(name)
            return {
                "kind": "storage#bucket",
                "id": name,
                "name": name,
                "metageneration": "1",
                "storageClass": "STANDARD",
            }

    def bucket(self, name: str) -> dict[str, Stored]:
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]", name):
            raise Refusal(400, "invalid", f"Invalid bucket name: '{name}'")
        if name not in self.buckets:
            raise Refusal(404, "notFound", "The specified bucket does not exist.")
        return self.buckets[name]

    def find(self, bucket: str, name: str, query: Mapping[str, str], *, reading: bool = False) -> Stored:
        """The live object, all preconditions checked; `generation` names one version, and only the live one is kept."""
        with self.lock:
            current = self.bucket(bucket).get(name)
            wanted = query.get("generation")
            if current is None or (wanted is not None and int(wanted) != current.generation):
                raise not_found(bucket, name)
            check_conditions(query, current, reading=reading)
            return current

    def write(self, bucket: str, metadata: Resource, data: bytes, query: Mapping[str, str]) -> Resource:
        """Make an object visible, whole, if hashes and preconditions hold."""
        with self.lock:
            name = metadata.get("name") or query.get("name")
            if not name or len(name.encode()) > 1024 or "\n" in name or "\r" in name:
                raise Refusal(
                    400, "required" if not name else "invalid", "Required" if not name else "Invalid object name"
                )
            objects = self.bucket(bucket)
            check_conditions(query, objects.get(name))
            check_hashes(data, metadata)
            resource = self._resource(bucket, name, data, metadata)
            objects[name] = Stored(data, resource)
            return resource

    def _resource(self, bucket: str, name: str, data: bytes, metadata: Resource) -> Resource:
        self._generation = max(self._generation + 1, time.time_ns() // 1000)
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        resource = {
            "kind": "storage#object",
            "id": f"{bucket}/{name}/{self._generation}",
            "name": name,
            "bucket": bucket,
            "generation": str(self._generation),
            "metageneration": "1",
            "contentType": metadata.get("contentType", "application/octet-stream"),
            "storageClass": "STANDARD",
            "size": str(len(data)),
            "md5Hash": md5_of(data),
            "crc32c": crc32c_of(data),
            "etag": base64.b64encode(str(self._generation).encode()).decode(),
            "timeCreated": now,
            "updated": now,
        }
        for optional in ("metadata", "kmsKeyName", "contentEncoding"):
            if metadata.get(optional):
                resource[optional] = metadata[optional]
        return resource

    def delete(self, bucket: str, name: str, query: Mapping[str, str]) -> None:
        with self.lock:
            self.find(bucket, name, query)
            del self.buckets[bucket][name]

    def listing(self, bucket: str, query: Mapping[str, str]) -> Resource:
        """One page: names ascending by UTF-8 bytes, at most `maxResults`, then a token for the next."""
        with self.lock:
            prefix, limit = query.get("prefix", ""), min(int(query.get("maxResults", self.page)), self.page)
            after = base64.urlsafe_b64decode(query["pageToken"]).decode() if query.get("pageToken") else None
            names = sorted((name for name in self.bucket(bucket) if name.startswith(prefix)), key=str.encode)
            if start := query.get("startOffset"):
                names = [name for name in names if name.encode() >= start.encode()]
            if after is not None:
                names = [name for name in names if name.encode() > after.encode()]
            page: Resource = {"kind": "storage#objects"}
            if names:
                page["items"] = [self.buckets[bucket][name].resource for name in names[:limit]]
            if len(names) > limit:
                page["nextPageToken"] = base64.urlsafe_b64encode(names[limit - 1].encode()).decode()
            return selected(page, query.get("fields"))

    def rewrite(
        self, source: tuple[str, str], target: tuple[str, str], metadata: Resource, query: Mapping[str, str]
    ) -> Resource:
        """Copy on the server; `rewrite_calls` says how many calls that takes."""
        with self.lock:
            conditions = {
                "if" + name.removeprefix("ifSource"): value for name, value in query.items() if "ifSource" in name
            }
            if "sourceGeneration" in query:
                conditions["generation"] = query["sourceGeneration"]
            stored = self.find(*source, conditions)
            size = len(stored.data)
            token = query.get("rewriteToken") or secrets.token_urlsafe(12)
            if query.get("rewriteToken") and token not in self._rewrites:
                raise Refusal(400, "invalid", "Invalid rewrite token")
            calls = self._rewrites[token] = self._rewrites.get(token, 0) + 1
            progress = {"kind": "storage#rewriteResponse", "objectSize": str(size)}
            if calls < self.rewrite_calls:
                rewritten = size * calls // self.rewrite_calls
                return {**progress, "totalBytesRewritten": str(rewritten), "done": False, "rewriteToken": token}
            del self._rewrites[token]
            kept = {key: stored.resource[key] for key in ("contentType", "metadata") if key in stored.resource}
            key = query.get("destinationKmsKeyName")
            resource = self.write(
                target[0], {**kept, **metadata, "name": target[1], "kmsKeyName": key}, stored.data, query
            )
            return {**progress, "totalBytesRewritten": str(size), "done": True, "resource": resource}

    # --- resumable uploads ---

    def begin(self, bucket: str, metadata: Resource, total: int | None, query: Mapping[str, str]) -> str:
        with self.lock:
            name = metadata.setdefault("name", query.get("name"))
            check_conditions(query, self.bucket(bucket).get(name))
            upload = secrets.token_urlsafe(24)
            conditions = {key: value for key, value in query.items() if key.startswith("if")}
            self.sessions[upload] = Session(bucket, metadata, conditions, total)
            return upload

    def session(self, upload: str) -> Session:
        if upload in self.expired:
            raise Refusal(410, "gone", "The upload session has been terminated.")
        if upload not in self.sessions:
            raise Refusal(404, "notFound", "No such upload session.")
        return self.sessions[upload]

    def receive(
        self, upload: str, start: int | None, data: bytes, total: int | None, hashes: Resource, whole: bool
    ) -> Session:
        """Take what arrived of one chunk (None: a status query). `whole` is False where the connection was cut.

        Bytes are persisted in multiples of 256 KiB, the last chunk excepted; the object appears when all have come.
        """
        with self.lock:
            session = self.session(upload)
            if session.done:
                return session
            if total is not None and session.total is not None and total != session.total:
                raise Refusal(400, "badRequest", f"The total {total} is not the announced {session.total}.")
            if start is not None:
                if start > len(session.received):
                    raise Refusal(400, "badRequest", "The chunk begins after the last byte that was persisted.")
                session.received += data[len(session.received) - start :]  # what was persisted before stays
            complete = whole and total is not None and len(session.received) == total
            if not complete:
                del session.received[len(session.received) // QUANTUM * QUANTUM :]
                return session
            try:
                announced = {**session.metadata, **hashes}
                check_hashes(bytes(session.received), announced)
                session.done = self.write(session.bucket, announced, bytes(session.received), session.conditions)
            except Refusal:
                del self.sessions[upload]
                raise
            session.received.clear()
            return session

    def cancel(self, upload: str) -> None:
        with self.lock:
            self.session(upload)
            del self.sessions[upload]


def selected(page: Resource, fields: str | None) -> Resource:
    """A partial response: `items(name,size),nextPageToken` keeps exactly that, as the API does."""
    if not fields:
        return page
    wanted = dict(_fields(fields))
    kept = {name: value for name, value in page.items() if name in wanted}
    if "items" in kept and wanted["items"]:
        kept["items"] = [{key: item[key] for key in wanted["items"] if key in item} for item in kept["items"]]
    return kept


def _fields(text: str) -> Iterator[tuple[str, list[str]]]:
    for match in re.finditer(r"([A-Za-z]+)(?:\(([^)]*)\))?", text):
        yield match[1], [name.strip() for name in match[2].split(",")] if match[2] else []
