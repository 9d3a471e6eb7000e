"""A hub of models and datasets on loopback, for huggingface_hub through HF_ENDPOINT.

It answers as the public one documents: `/api/models/…` and `/api/datasets/…` for facts and paged trees, `/…/resolve/…`
with `ETag` and `X-Repo-Commit`, a redirect to a content server for large files, ranges, and the error codes of
repositories that are gated, private or not there. Faults are set by attributes while it runs.
"""

import hashlib
import json
import re
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote, unquote, urlsplit

import pytest

LARGE = 4096  # bytes from which on a file is kept by the content server
PAGE = 3  # tree entries in one answer, so that every test pages
_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?")
_RESOLVE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Repository:
    """Files by name, and who may read them: `token` None lets everybody."""

    files: dict[str, bytes]
    gated: bool = False
    private: bool = False
    token: str | None = None

    @property
    def commit(self) -> str:
        total = hashlib.sha1(usedforsecurity=False)
        for name, data in sorted(self.files.items()):
            total.update(f"{name}\0{len(data)}\0".encode() + data)
        return total.hexdigest()


@dataclass
class Hub:
    """The server; `with Hub() as hub: hub.url`."""

    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)  # "GET /path" of each request
    tokens: set[str] = field(default_factory=set)  # every token that came, wherever
    tokens_at_content: set[str] = field(default_factory=set)
    cut: Counter[str] = field(default_factory=Counter)  # file name: how often to cut its answer in half
    flip: Counter[str] = field(default_factory=Counter)  # file name: how often to flip a byte of it
    fail: int = 0  # status of every answer
    pause: threading.Event | None = None  # content is held back until it is set
    waiting: threading.Event = field(default_factory=threading.Event)  # somebody waits for `pause`

    def model(self, name: str, files: dict[str, bytes] | Path, **access: object) -> Repository:
        return self._add("models", name, files, access)

    def dataset(self, name: str, files: dict[str, bytes] | Path, **access: object) -> Repository:
        return self._add("datasets", name, files, access)

    def _add(self, kind: str, name: str, files: dict[str, bytes] | Path, access: dict[str, object]) -> Repository:
        if isinstance(files, Path):
            files = {
                path.relative_to(files).as_posix(): path.read_bytes() for path in files.rglob("*") if path.is_file()
            }
        made = Repository(files, **access)
        self.repositories[kind, name] = made
        return made

    def downloads(self) -> list[str]:
        """Names of the files whose content was asked for, in order."""
        return [line.rsplit("/", 1)[-1] for line in self.requests if line.startswith("GET ") and "/api/" not in line]

    def __enter__(self) -> Self:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = _Http(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.pause is not None:
            self.pause.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """No traceback of clients that hang up among what a test captures; of our own bugs there is one."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.requests.append(f"{self.command} {path}")
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token:
            hub.tokens.add(token)
        if hub.fail:
            self._error(hub.fail, None, "the hub is tired")
        elif path.startswith("/content/"):
            hub.tokens_at_content |= {token} - {""}
            self._content(path)
        elif match := _API.fullmatch(path):
            self._api(token, match)
        elif match := _RESOLVE.fullmatch(path):
            self._resolve(token, match)
        else:
            self._error(404, None, "no such page")

    do_HEAD = do_GET

    def _repository(self, kind: str, name: str, token: str, content: bool) -> Repository | None:
        """The repository, None where an error was sent instead."""
        found = self.hub.repositories.get((kind, name))
        if token.startswith("bad"):
            self._error(401, None, "Invalid credentials in Authorization header")
        elif found is None or (found.private and token != found.token):
            self._error(404 if token else 401, "RepoNotFound", "Repository not found")
        elif found.gated and content and token != found.token:
            who = "You are not in the authorized list" if token else "You must be authenticated to access it"
            self._error(403 if token else 401, "GatedRepo", f"Access to model {name} is restricted. {who}")
        else:
            return found
        return None

    def _api(self, token: str, match: re.Match[str]) -> None:
        kind, name, what, revision = match.groups()
        found = self._repository(kind, name, token, content=False)
        if found is None:
            return
        if revision not in (None, "main", found.commit):
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif what == "tree":
            self._tree(found)
        else:
            facts = {
                "id": name,
                "sha": found.commit,
                "private": found.private,
                "gated": "manual" if found.gated else False,
                "siblings": [{"rfilename": file} for file in found.files],
            }
            self._json(facts | ({"modelId": name} if kind == "models" else {}))

    def _tree(self, found: Repository) -> None:
        url = urlsplit(self.path)
        begin = int(url.query.rpartition("cursor=")[2]) if "cursor=" in url.query else 0
        entries = [_entry(name, data) for name, data in found.files.items()]
        folders = {name.rsplit("/", 1)[0] for name in found.files if "/" in name}
        entries = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": folder} for folder in folders] + entries
        after = begin + PAGE
        link = {}
        if after < len(entries):
            link = {"Link": f'<{self.hub.url}{url.path}?recursive=True&cursor={after}>; rel="next"'}
        self._json(entries[begin:after], link)

    def _resolve(self, token: str, match: re.Match[str]) -> None:
        datasets, name, revision, file = match.groups()
        found = self._repository("datasets" if datasets else "models", name, token, content=True)
        if found is None:
            return
        data = found.files.get(file)
        if revision not in ("main", found.commit):
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif data is None:
            self._error(404, "EntryNotFound", "Entry not found")
        elif len(data) < LARGE:
            self._bytes(file, data, {"ETag": f'"{_blob(data)}"', "X-Repo-Commit": found.commit})
        else:
            digest = hashlib.sha256(data).hexdigest()
            # another host name than the hub's: the token must not go there
            content = self.hub.url.replace("127.0.0.1", "localhost")
            where = f"{content}/content/{'datasets' if datasets else 'models'}/{quote(name)}/{quote(file)}"
            headers = {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{digest}"', "X-Repo-Commit": found.commit}
            self._answer(302, b"", headers | {"Location": f"{where}?signature=abc"})

    def _content(self, path: str) -> None:
        _, _, kind, owner, name, file = path.split("/", 5)
        if self.hub.pause is not None and self.command == "GET":
            self.hub.waiting.set()
            self.hub.pause.wait(30)
        self._bytes(file, self.hub.repositories[kind, f"{owner}/{name}"].files[file], {"ETag": '"content"'})

    def _bytes(self, file: str, data: bytes, headers: dict[str, str]) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        status, body = 200, data
        if self.command == "GET" and self.hub.flip[file] > 0:
            self.hub.flip[file] -= 1
            body = bytes([data[0] ^ 1]) + data[1:]
        if wanted:
            start = int(wanted[1])
            status, body = 206, body[start:]
            headers |= {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        self._answer(status, body, headers | {"Accept-Ranges": "bytes"}, file)

    def _json(self, document: object, headers: dict[str, str] | None = None) -> None:
        self._answer(200, json.dumps(document).encode(), {"Content-Type": "application/json"} | (headers or {}))

    def _error(self, status: int, code: str | None, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._answer(status, json.dumps({"error": message}).encode(), headers)

    def _answer(self, status: int, body: bytes, headers: dict[str, str], file: str = "") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.cut[file] > 0:
            self.hub.cut[file] -= 1
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        else:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub that huggingface_hub takes for the real one; nobody is logged in."""
    import huggingface_hub.constants as constants

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


def _blob(data: bytes) -> str:
    """What git calls a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _entry(name: str, data: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "oid": _blob(data), "size": len(data), "path": name}
    if len(data) >= LARGE:
        digest = hashlib.sha256(data).hexdigest()
        entry |= {"lfs": {"oid": digest, "size": len(data), "pointerSize": 134}}
    return entry
