"""A small Google Cloud Storage server for the tests: the JSON API over HTTP, on loopback, in threads.

It does what the public documentation says and emulators leave out: generation and metageneration preconditions,
resumable uploads with 308, `Range` and status queries, hashes checked on arrival, rewrites in several calls, service
accounts that exchange a signed JWT for a bearer token. `storage` holds everything; a test may reach into it.
As with Google, downloads do not carry custom metadata.
"""

import json
import re
import secrets
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, parse_qsl, unquote, urlsplit

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.servers.gcs_objects import Refusal, Resource, Storage

EMAIL = "worker@tests.iam.gserviceaccount.com"
_GRANT = "urn:ietf:params:oauth:grant-type:jwt-bearer"
_AUDIENCE = "https://oauth2.googleapis.com/token"  # in every JWT, whatever the token server's address
_BUCKET = r"/b/(?P<bucket>[^/]+)"
_OBJECT = _BUCKET + r"/o/(?P<name>[^/]+)"


class GcsServer:
    """`with GcsServer() as server:` serves `server.url`, to who has the credentials of `server.service_account()`."""

    def __init__(self, *, anonymous: bool = False) -> None:
        self.storage = Storage()
        self.anonymous = anonymous  # whether requests without a token are served, as emulators do
        self.tokens: dict[str, float] = {}  # access token to the time it expires
        self.denied: set[str] = set()  # buckets on which the service account has no permission
        self.requests: list[tuple[str, str]] = []  # method and path with query, in order
        self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        handler = type("Handler", (_Handler,), {"owner": self})
        self._http = _Http(("127.0.0.1", 0), handler)
        self.port: int = self._http.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> "GcsServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join(60)

    def service_account(self, *, known: bool = True) -> dict[str, str]:
        """The content of a service account's key file; its token server is this one, which refuses unknown keys."""
        private = self._key if known else rsa.generate_private_key(public_exponent=65537, key_size=2048)
        key = private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return {
            "type": "service_account",
            "project_id": "tests",
            "private_key_id": "tests",
            "private_key": key.decode(),
            "client_email": EMAIL,
            "client_id": "1",
            "token_uri": f"{self.url}/token",
        }

    def grant(self, assertion: str) -> Resource:
        """An access token for a JWT that the service account has signed."""
        try:
            claims = jwt.decode(assertion, self._key.public_key(), algorithms=["RS256"], audience=_AUDIENCE)
        except jwt.PyJWTError as error:
            raise Refusal(400, "invalid_grant", f"Invalid JWT: {error}") from None
        if claims["iss"] != EMAIL or "devstorage" not in claims.get("scope", ""):
            raise Refusal(400, "invalid_grant", "Invalid issuer or scope")
        token = "ya29." + secrets.token_urlsafe(24)
        self.tokens[token] = time.time() + 3600
        return {"access_token": token, "expires_in": 3599, "token_type": "Bearer"}

    def expire_tokens(self) -> None:
        """From now on every token handed out so far is refused."""
        self.tokens.clear()

    def expire_sessions(self) -> None:
        """Every unfinished resumable upload is gone, as after a week."""
        self.storage.expired.update(self.storage.sessions)


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def handle_error(self, *_: Any) -> None:
        """Clients that hang up are what these tests are about: no traceback for them."""


class _Handler(BaseHTTPRequestHandler):
    owner: ClassVar[GcsServer]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 120

    # --- requests ---

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_PUT(self) -> None:
        self._serve("PUT")

    def do_DELETE(self) -> None:
        self._serve("DELETE")

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def _serve(self, method: str) -> None:
        parts = urlsplit(self.path)
        self.query = dict(parse_qsl(parts.query, keep_blank_values=True))
        self.owner.requests.append((method, self.path))
        self.media = self.query.get("alt") == "media"
        self.body, self.whole = self._read()
        try:
            for verb, pattern, action in _ROUTES:
                match = re.fullmatch(pattern, parts.path) if verb == method else None
                if match:
                    arguments = {key: unquote(value) for key, value in match.groupdict().items()}
                    self._authorize(action, arguments)
                    action(self, **arguments)
                    return
            raise Refusal(404, "notFound", "Not Found")
        except Refusal as refusal:
            self._refuse(refusal)

    def _read(self) -> tuple[bytes, bool]:
        """The body, and whether all of it came."""
        announced = int(self.headers.get("Content-Length") or 0)
        parts, missing = [], announced
        try:
            while missing and (part := self.rfile.read1(min(missing, 1 << 20))):
                parts.append(part)
                missing -= len(part)
        except OSError:
            pass  # reset by the peer: as good as cut
        if missing:
            self.close_connection = True
        return b"".join(parts), not missing

    def _authorize(self, action: Callable[..., None], arguments: dict[str, str]) -> None:
        # a session's URI is a capability, and who asks for a token has none yet
        if action in (_Handler.token, _Handler.chunk, _Handler.cancel):
            return
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if not token:
            if not self.owner.anonymous:
                message = (
                    "Anonymous caller does not have storage.objects.get access to the Google Cloud Storage object."
                )
                raise Refusal(401, "required", message)
        elif scheme != "Bearer" or self.owner.tokens.get(token, 0) < time.time():
            raise Refusal(401, "authError", "Invalid Credentials")
        for bucket in (arguments.get("bucket"), arguments.get("target")):
            if bucket in self.owner.denied:
                message = f"{EMAIL} does not have storage.objects.get access to the Google Cloud Storage object."
                raise Refusal(403, "forbidden", message)

    # --- answers ---

    def _send(
        self, status: int, body: bytes = b"", kind: str = "application/json; charset=UTF-8", **headers: str
    ) -> None:
        if not self.whole:
            return  # nobody is there to read an answer
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if body:
            self.send_header("Content-Type", kind)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _json(self, document: Resource) -> None:
        self._send(200, json.dumps(document).encode())

    def _refuse(self, refusal: Refusal) -> None:
        if refusal.reason == "invalid_grant":
            document: Resource = {"error": refusal.reason, "error_description": refusal.message}
            self._send(refusal.status, json.dumps(document).encode())
        elif refusal.status == 304:
            self._send(304)
        elif self.media:  # errors of downloads are plain text
            self._send(refusal.status, refusal.message.encode(), "text/html; charset=UTF-8")
        else:
            detail = {"message": refusal.message, "domain": "global", "reason": refusal.reason}
            error = {"code": refusal.status, "message": refusal.message, "errors": [detail]}
            extra = {"WWW_Authenticate": 'Bearer realm="https://accounts.google.com/"'} if refusal.status == 401 else {}
            self._send(refusal.status, json.dumps({"error": error}).encode(), **extra)

    # --- actions ---

    def token(self) -> None:
        form = {name: values[0] for name, values in parse_qs(self.body.decode()).items()}
        if form.get("grant_type") != _GRANT:
            raise Refusal(400, "invalid_grant", "unsupported grant")
        self._json(self.owner.grant(form.get("assertion", "")))

    def make_bucket(self) -> None:
        self._json(self.owner.storage.make_bucket(json.loads(self.body)["name"]))

    def get_bucket(self, bucket: str) -> None:
        self._json(self.owner.storage.bucket_resource(bucket))

    def list_objects(self, bucket: str) -> None:
        self._json(self.owner.storage.listing(bucket, self.query))

    def get_object(self, bucket: str, name: str) -> None:
        stored = self.owner.storage.find(bucket, name, self.query, reading=True)
        if not self.media:
            self._json(stored.resource)
            return
        resource, size, headers, status = stored.resource, len(stored.data), {}, 200
        start, end = 0, size
        if wanted := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            start, end = _range(wanted[1], wanted[2], size)
            status, headers = 206, {"Content_Range": f"bytes {start}-{end - 1}/{size}"}
        self._send(
            status,
            stored.data[start:end],
            resource["contentType"],
            ETag=resource["etag"],
            X_Goog_Generation=resource["generation"],
            X_Goog_Metageneration=resource["metageneration"],
            X_Goog_Hash=f"crc32c={resource['crc32c']},md5={resource['md5Hash']}",
            X_Goog_Storage_Class=resource["storageClass"],
            X_Goog_Stored_Content_Encoding="identity",
            X_Goog_Stored_Content_Length=str(size),
            **headers,
        )

    def delete_object(self, bucket: str, name: str) -> None:
        self.owner.storage.delete(bucket, name, self.query)
        self._send(204)

    def rewrite(self, bucket: str, name: str, target: str, target_name: str) -> None:
        metadata = json.loads(self.body or b"{}")
        self._json(self.owner.storage.rewrite((bucket, name), (target, target_name), metadata, self.query))

    def upload(self, bucket: str) -> None:
        kind = self.query.get("uploadType")
        if kind == "resumable":
            self._begin(bucket)
            return
        if not self.whole:
            return  # cut on the way: nothing is stored
        if kind == "multipart":
            metadata, data = self._multipart()
        elif kind == "media":
            metadata, data = {"name": self.query.get("name"), **_hashes(self.headers)}, self.body
        else:
            raise Refusal(400, "invalid", "Unknown uploadType")
        if self.query.get("kmsKeyName"):
            metadata["kmsKeyName"] = self.query["kmsKeyName"] + "/cryptoKeyVersions/1"
        self._json(self.owner.storage.write(bucket, metadata, data, self.query))

    def _multipart(self) -> tuple[Resource, bytes]:
        boundary = re.search(r'boundary="?([^";]+)', self.headers.get("Content-Type", ""))
        if not boundary:
            raise Refusal(400, "badContent", "Malformed multipart body.")
        _, metadata, data, last = self.body.split(b"--" + boundary[1].encode(), 3)
        if last.strip() != b"--":
            raise Refusal(400, "badContent", "Malformed multipart body.")
        document: Resource = json.loads(metadata.partition(b"\r\n\r\n")[2])
        return document, data.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n")

    def _begin(self, bucket: str) -> None:
        metadata: Resource = json.loads(self.body or b"{}")
        announced = self.headers.get("X-Upload-Content-Length")
        if self.query.get("kmsKeyName"):
            metadata["kmsKeyName"] = self.query["kmsKeyName"] + "/cryptoKeyVersions/1"
        upload = self.owner.storage.begin(bucket, metadata, int(announced) if announced else None, self.query)
        address = f"http://{self.headers['Host']}{urlsplit(self.path).path}?uploadType=resumable&upload_id={upload}"
        self._send(200, Location=address, X_GUploader_UploadID=upload)

    def chunk(self, bucket: str) -> None:
        wanted = self.headers.get("Content-Range", f"bytes 0-{len(self.body) - 1}/{len(self.body)}")
        match = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", wanted)
        if not match:
            raise Refusal(400, "badRequest", f"Failed to parse Content-Range header {wanted!r}.")
        start = int(match[1]) if match[1] else None
        if start is not None and self.whole and int(match[2]) - start + 1 != len(self.body):
            raise Refusal(400, "badRequest", "Content-Range does not agree with Content-Length.")
        session = self.owner.storage.receive(
            self.query.get("upload_id", ""),
            start,
            self.body,
            None if match[3] == "*" else int(match[3]),
            _hashes(self.headers),
            self.whole,
        )
        if session.done:
            self._json(session.done)
        else:
            persisted = len(session.received)
            self._send(308, **({"Range": f"bytes=0-{persisted - 1}"} if persisted else {}))

    def cancel(self, bucket: str) -> None:
        self.owner.storage.cancel(self.query.get("upload_id", ""))
        self._send(499)


def _range(first: str, last: str, size: int) -> tuple[int, int]:
    """Start and end (exclusive) of a `Range` header's bytes."""
    if first:
        start, end = int(first), min(int(last) + 1 if last else size, size)
    else:
        start, end = max(0, size - int(last)), size
    if start >= size:
        raise Refusal(416, "requestedRangeNotSatisfiable", "Request range not satisfiable")
    return start, end


def _hashes(headers: Any) -> Resource:
    """What `X-Goog-Hash: crc32c=…,md5=…` and `Content-MD5` announce, by the names of an object's resource."""
    found = {
        key: value for key, _, value in (part.partition("=") for part in headers.get("X-Goog-Hash", "").split(","))
    }
    named = {"crc32c": found.get("crc32c"), "md5Hash": found.get("md5") or headers.get("Content-MD5")}
    return {key: value for key, value in named.items() if value}


_ROUTES: tuple[tuple[str, str, Callable[..., None]], ...] = (
    ("POST", "/token", _Handler.token),
    ("POST", "/storage/v1/b", _Handler.make_bucket),
    ("GET", "/storage/v1" + _BUCKET, _Handler.get_bucket),
    ("GET", "/storage/v1" + _BUCKET + "/o", _Handler.list_objects),
    ("GET", "(?:/download)?/storage/v1" + _OBJECT, _Handler.get_object),
    ("DELETE", "/storage/v1" + _OBJECT, _Handler.delete_object),
    ("POST", "/storage/v1" + _OBJECT + "/rewriteTo/b/(?P<target>[^/]+)/o/(?P<target_name>[^/]+)", _Handler.rewrite),
    ("POST", "/upload/storage/v1" + _BUCKET + "/o", _Handler.upload),
    ("PUT", "/upload/storage/v1" + _BUCKET + "/o", _Handler.chunk),
    ("DELETE", "/upload/storage/v1" + _BUCKET + "/o", _Handler.cancel),
)
