"""The test server against the public documentation of the JSON API, request by request."""

import base64
import hashlib
import json
import os
from types import SimpleNamespace

import google_crc32c
import pytest
import requests

from tests.servers.gcs_objects import QUANTUM
from tests.servers.gcs_server import GcsServer


def md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data).digest()).decode()


def crc32c(data: bytes) -> str:
    return base64.b64encode(google_crc32c.value(data).to_bytes(4, "big")).decode()


@pytest.fixture(scope="module")
def server():
    with GcsServer(anonymous=True) as server:
        server.storage.make_bucket("bucket")
        yield server


@pytest.fixture
def api(server):
    """The addresses, and a session."""
    server.storage.buckets["bucket"].clear()
    objects = f"{server.url}/storage/v1/b/bucket/o"
    with requests.Session() as http:
        yield SimpleNamespace(http=http, objects=objects, upload=f"{server.url}/upload/storage/v1/b/bucket/o")


def put(api, name: str, data: bytes, headers=None, **conditions):
    params = {"uploadType": "media", "name": name, **conditions}
    return api.http.post(api.upload, params=params, data=data, headers=headers)


def begin(api, name: str, metadata=None, **params) -> str:
    answer = api.http.post(api.upload, params={"uploadType": "resumable", "name": name, **params}, json=metadata or {})
    assert answer.status_code == 200
    return answer.headers["Location"]


def chunk(api, session: str, data: bytes, content_range: str, headers=None):
    return api.http.put(session, data=data, headers={"Content-Range": content_range, **(headers or {})})


class Test_preconditions:
    def test_of_writes(self, api):
        first = put(api, "a", b"1", ifGenerationMatch=0).json()
        assert put(api, "a", b"2", ifGenerationMatch=0).status_code == 412
        assert put(api, "a", b"2", ifGenerationMatch=int(first["generation"]) + 1).status_code == 412
        assert put(api, "a", b"2", ifMetagenerationMatch=2).status_code == 412
        assert put(api, "a", b"2", ifGenerationNotMatch=first["generation"]).status_code == 412
        second = put(api, "a", b"2", ifGenerationMatch=first["generation"], ifMetagenerationMatch=1).json()
        assert int(second["generation"]) > int(first["generation"])
        refused = put(api, "a", b"3", ifGenerationMatch=first["generation"]).json()["error"]
        assert (refused["code"], refused["errors"][0]["reason"]) == (412, "conditionNotMet")

    @pytest.mark.parametrize("media", [{}, {"alt": "media"}])
    def test_of_reads(self, api, media):
        generation = put(api, "a", b"1").json()["generation"]
        for condition, status in (
            ({"ifGenerationMatch": generation}, 200),
            ({"ifGenerationMatch": 1}, 412),
            ({"ifGenerationNotMatch": generation}, 304),
            ({"ifMetagenerationMatch": 7}, 412),
            ({"ifMetagenerationNotMatch": 1}, 304),
            ({"generation": generation}, 200),
            ({"generation": 1}, 404),
        ):
            assert api.http.get(f"{api.objects}/a", params={**media, **condition}).status_code == status, condition

    def test_of_deletes_and_copies(self, api):
        generation = put(api, "a", b"1").json()["generation"]
        assert api.http.delete(f"{api.objects}/a", params={"ifGenerationMatch": 1}).status_code == 412
        copy = f"{api.objects}/a/rewriteTo/b/bucket/o/b"
        assert api.http.post(copy, params={"ifSourceGenerationMatch": 1}).status_code == 412
        assert api.http.post(copy, params={"ifGenerationMatch": 0}).json()["done"]
        assert api.http.post(copy, params={"ifGenerationMatch": 0}).status_code == 412
        assert api.http.delete(f"{api.objects}/a", params={"ifGenerationMatch": generation}).status_code == 204
        assert api.http.delete(f"{api.objects}/a").status_code == 404

    def test_of_resumable_uploads_hold_at_both_ends(self, api):
        session = begin(api, "a", ifGenerationMatch=0)
        put(api, "a", b"first")
        params = {"uploadType": "resumable", "name": "a", "ifGenerationMatch": 0}
        assert api.http.post(api.upload, params=params).status_code == 412
        assert chunk(api, session, b"second", "bytes 0-5/6").status_code == 412
        assert api.http.get(f"{api.objects}/a", params={"alt": "media"}).content == b"first"


class Test_resumable_uploads:
    def test_chunks_and_status_queries(self, api):
        data = os.urandom(3 * QUANTUM + 5)
        session = begin(api, "a")
        answer = chunk(api, session, b"", "bytes */*")
        assert (answer.status_code, answer.headers.get("Range")) == (308, None)
        # what is no multiple of 256 KiB is not kept
        answer = chunk(api, session, data[: QUANTUM + 7], f"bytes 0-{QUANTUM + 6}/*")
        assert (answer.status_code, answer.headers["Range"]) == (308, f"bytes=0-{QUANTUM - 1}")
        assert chunk(api, session, b"", f"bytes */{len(data)}").headers["Range"] == f"bytes=0-{QUANTUM - 1}"
        assert chunk(api, session, data[2 * QUANTUM :], f"bytes {2 * QUANTUM}-{len(data) - 1}/*").status_code == 400
        assert api.http.get(f"{api.objects}/a").status_code == 404
        last = chunk(api, session, data[QUANTUM:], f"bytes {QUANTUM}-{len(data) - 1}/{len(data)}")
        assert (last.status_code, last.json()["md5Hash"]) == (200, md5(data))
        assert chunk(api, session, b"", "bytes */*").json() == last.json()

    def test_the_end_of_a_session(self, api, server):
        session = begin(api, "a")
        assert api.http.delete(session).status_code == 499
        assert chunk(api, session, b"x", "bytes 0-0/1").status_code == 404
        session = begin(api, "a")
        server.expire_sessions()
        assert chunk(api, session, b"x", "bytes 0-0/1").status_code == 410

    @pytest.mark.parametrize("where", ["metadata", "last request"])
    def test_a_wrong_checksum_stores_nothing(self, api, where):
        wrong = crc32c(b"other")
        session = begin(api, "a", {"crc32c": wrong} if where == "metadata" else None)
        headers = {} if where == "metadata" else {"X-Goog-Hash": f"crc32c={wrong}"}
        answer = chunk(api, session, b"data", "bytes 0-3/4", headers)
        assert (answer.status_code, answer.json()["error"]["errors"][0]["reason"]) == (400, "invalid")
        assert api.http.get(f"{api.objects}/a").status_code == 404


class Test_checksums:
    @pytest.mark.parametrize("kind", ["crc32c", "md5", "Content-MD5"])
    def test_of_simple_uploads(self, api, kind):
        def header(data):
            digest = crc32c(data) if kind == "crc32c" else md5(data)
            return {"Content-MD5": digest} if kind == "Content-MD5" else {"X-Goog-Hash": f"{kind}={digest}"}

        assert put(api, "a", b"data", header(b"other")).status_code == 400
        assert put(api, "a", b"data", header(b"data")).status_code == 200
        headers = api.http.get(f"{api.objects}/a", params={"alt": "media"}).headers
        assert headers["X-Goog-Hash"] == f"crc32c={crc32c(b'data')},md5={md5(b'data')}"

    @pytest.mark.parametrize("good", [True, False])
    def test_of_multipart_uploads(self, api, good):
        metadata = {"name": "a", "md5Hash": md5(b"--data\r\n" if good else b"other"), "metadata": {"x": "y"}}
        parts = (
            (b"Content-Type: application/json", json.dumps(metadata).encode()),
            (b"Content-Type: x/y", b"--data\r\n"),
        )
        body = b"".join(b"--b\r\n" + head + b"\r\n\r\n" + content + b"\r\n" for head, content in parts) + b"--b--"
        kind = {"Content-Type": "multipart/related; boundary=b"}
        answer = api.http.post(api.upload, params={"uploadType": "multipart"}, data=body, headers=kind)
        assert answer.status_code == (200 if good else 400)
        assert api.http.get(f"{api.objects}/a").status_code == (200 if good else 404)


class Test_listings_and_errors:
    def test_pages(self, api):
        names = ["a/1", "a/2", "b", "ä", "\U0001f999", "\ue000"]
        for name in names:
            put(api, name, b"x")
        seen, token = [], None
        while token is not None or not seen:
            params = {"maxResults": 2, "pageToken": token, "fields": "items(name),nextPageToken"}
            page = api.http.get(api.objects, params=params).json()
            assert all(set(item) == {"name"} for item in page["items"])
            seen += [item["name"] for item in page["items"]]
            token = page.get("nextPageToken")
        assert seen == sorted(names, key=str.encode)
        page = api.http.get(api.objects, params={"prefix": "a/", "startOffset": "a/2"}).json()
        assert [item["name"] for item in page["items"]] == ["a/2"]

    def test_ranges(self, api):
        put(api, "a", b"0123456789")
        for wanted, content in (("0-3", b"0123"), ("7-", b"789"), ("-2", b"89"), ("8-100", b"89")):
            answer = api.http.get(f"{api.objects}/a", params={"alt": "media"}, headers={"Range": f"bytes={wanted}"})
            assert (answer.status_code, answer.content) == (206, content)
        answer = api.http.get(f"{api.objects}/a", params={"alt": "media"}, headers={"Range": "bytes=10-"})
        assert answer.status_code == 416

    def test_what_is_not_there(self, api, server):
        assert api.http.get(f"{server.url}/storage/v1/b/nobody").json()["error"]["code"] == 404
        answer = api.http.get(f"{api.objects}/a", params={"alt": "media"})
        assert (answer.status_code, answer.text) == (404, "No such object: bucket/a")

    def test_who_may(self):
        with GcsServer() as server:
            server.storage.make_bucket("bucket")
            address = f"{server.url}/storage/v1/b/bucket/o"
            refused = requests.get(address, timeout=10)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, 401)
            assert requests.get(address, headers={"Authorization": "Bearer x"}, timeout=10).status_code == 401
            server.tokens["good"] = 1e12
            assert requests.get(address, headers={"Authorization": "Bearer good"}, timeout=10).status_code == 200
            server.denied.add("bucket")
            refused = requests.get(address, headers={"Authorization": "Bearer good"}, timeout=10)
            assert (refused.status_code, refused.json()["error"]["errors"][0]["reason"]) == (403, "forbidden")
