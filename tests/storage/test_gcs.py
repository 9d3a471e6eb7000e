"""Google Cloud Storage beyond what all buckets have in common: sessions, checksums, credentials, and our own server."""

import hashlib
import json
import logging
import os
import re
import time
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.servers.gcs_objects import QUANTUM
from tests.servers.gcs_server import GcsServer
from tests.servers.proxy import Proxy
from wmtp_worker.errors import (
    AccessDenied,
    BucketNotFound,
    IntegrityError,
    ObjectNotFound,
    PreconditionFailed,
    SettingsError,
    TransientError,
)
from wmtp_worker.storage import http

MIB = 1 << 20
PART = 4 * QUANTUM
KMS_KEY = "projects/p/locations/l/keyRings/r/cryptoKeys/k"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def proxy(gcs_process):
    with Proxy("127.0.0.1", gcs_process.port) as proxy:
        yield proxy


@pytest.fixture
def direct(gcs_server, opened):
    """An empty part of a bucket, without a proxy."""
    return opened(gcs_server)


@pytest.fixture
def store(gcs_server, opened, direct, proxy):
    """The same place as `direct`, through the proxy."""
    return opened(gcs_server, prefix=direct.url.rpartition("/")[2], endpoint_url=proxy.endpoint)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "large"
    path.write_bytes(os.urandom(2 * PART + PART // 2 + 1))
    return path


def send(upload, source) -> list[int]:
    """Send the parts that are not there, and say which."""
    data, sent = source.read_bytes(), []
    for number, start in enumerate(range(0, len(data), upload.part_size)):
        part = data[start : start + upload.part_size]
        if not upload.has(number, part):
            upload.put(number, memoryview(part))
            sent.append(number)
    return sent


class Test_checksums:
    def test_a_small_object_damaged_on_the_way_up_is_not_stored(self, store, proxy):
        proxy.flip("up", 5000, match="^POST .*upload")
        with pytest.raises(TransientError, match="doesn't match"):
            store.put("key", os.urandom(10_000))
        assert list(store.list()) == []

    def test_a_large_one_neither(self, store, proxy, source):
        store.put("large", b"old")
        upload = store.begin("large", source.stat().st_size, sha256(source.read_bytes()), PART, None)
        proxy.flip("up", 5000, match="^PUT")
        send(upload, source)
        with pytest.raises(IntegrityError):
            upload.finish()
        assert proxy.pending == 0
        assert bytes(store.get("large")[1]) == b"old"
        # the session is of no use any more
        again = store.begin("large", source.stat().st_size, sha256(source.read_bytes()), PART, upload.token)
        assert send(again, source) == [0, 1, 2]
        assert again.finish().sha256 == sha256(source.read_bytes())

    def test_an_object_damaged_on_the_way_down_is_not_taken(self, store, proxy):
        store.put("key", os.urandom(10_000))
        proxy.flip("down", 5000, match="alt=media")
        with pytest.raises(TransientError, match="changed on the way"):
            store.get("key")

    def test_a_body_that_breaks_off_is_transient(self, store, proxy):
        store.put("key", os.urandom(10_000))
        for length in (None, 9000):
            proxy.cut("down", 5000, match="alt=media")
            with pytest.raises(TransientError):
                store.get("key", 0, length)

    def test_listings_have_both_digests(self, direct):
        direct.put("key", b"data")
        (info,) = direct.list()
        assert (info.sha256, info.md5) == (sha256(b"data"), hashlib.md5(b"data").hexdigest())
        assert direct.get("key")[0].md5 == info.md5


class Test_sessions:
    def test_parts_are_multiples_of_what_the_server_keeps(self, direct, source):
        upload = direct.begin("large", source.stat().st_size, sha256(source.read_bytes()), MIB + 1, None)
        assert upload.part_size == MIB + QUANTUM
        assert upload.sequential
        # the third is one byte, held back
        assert send(upload, source) == [0, 1]
        upload.finish()
        assert bytes(direct.get("large")[1]) == source.read_bytes()

    @pytest.mark.parametrize("size", [0, 1, QUANTUM, QUANTUM + 1, PART, 2 * PART - 1, 2 * PART, 2 * PART + QUANTUM])
    def test_every_size_ends_right(self, direct, tmp_path, size):
        path = tmp_path / "file"
        path.write_bytes(os.urandom(size))
        upload = direct.begin("large", path.stat().st_size, sha256(path.read_bytes()), PART, None)
        send(upload, path)
        assert list(direct.list()) == []
        assert upload.finish().size == size
        assert upload.finish().size == size
        assert bytes(direct.get("large")[1]) == path.read_bytes()

    def test_only_what_the_server_has_not_kept_is_sent_again(self, store, proxy, gcs_process, source):
        data = source.read_bytes()
        upload = store.begin("large", source.stat().st_size, sha256(data), PART, None)
        proxy.cut("up", 2 * QUANTUM + 1000, match="^PUT", reset=True)
        with pytest.raises(TransientError):
            upload.put(0, data[:PART])
        # the client sees the end of the connection, and might ask, before the server has taken in what came by it
        session = gcs_process.storage.sessions[parse_qs(urlsplit(upload.token["session"]).query)["upload_id"][0]]
        deadline = time.monotonic() + 30
        while len(session.received) < 2 * QUANTUM and time.monotonic() < deadline:
            time.sleep(0.01)
        sent = proxy.bytes_up
        upload.put(0, data[:PART])
        assert proxy.bytes_up - sent < PART - QUANTUM
        send(upload, source)
        assert upload.finish().sha256 == sha256(data)
        assert bytes(store.get("large")[1]) == data

    def test_a_part_is_sent_again_whole_if_nothing_of_it_was_kept(self, store, proxy, source):
        data = source.read_bytes()
        upload = store.begin("large", source.stat().st_size, sha256(data), PART, None)
        proxy.answer(503, times=2, match="^PUT")
        for _ in range(2):
            with pytest.raises(TransientError):
                upload.put(0, data[:PART])
        assert send(upload, source) == [0, 1, 2]
        upload.finish()
        assert bytes(store.get("large")[1]) == data

    @pytest.mark.parametrize("when", ["here", "elsewhere"])
    def test_an_end_whose_answer_was_lost_is_found(self, store, proxy, source, when):
        digest = sha256(source.read_bytes())
        upload = store.begin("large", source.stat().st_size, digest, PART, None)
        send(upload, source)
        proxy.lose_response(match="^PUT")
        with pytest.raises(TransientError):
            upload.finish()
        if when == "elsewhere":
            upload = store.begin("large", source.stat().st_size, digest, PART, upload.token)
            assert send(upload, source) == []
        info = upload.finish()
        assert (info.version, info.sha256) == (store.head("large").version, digest)

    def test_a_session_that_expires_is_reported_and_not_continued(self, direct, gcs_process, source):
        data = source.read_bytes()
        upload = direct.begin("large", source.stat().st_size, sha256(data), PART, None)
        upload.put(0, data[:PART])
        gcs_process.expire_sessions()
        with pytest.raises(ObjectNotFound, match="gone"):
            upload.put(1, data[PART : 2 * PART])
        again = direct.begin("large", source.stat().st_size, sha256(data), PART, upload.token)
        assert again.token["session"] != upload.token["session"]
        assert send(again, source) == [0, 1, 2]
        again.finish()

    def test_another_server_never_gets_our_credentials(self, store, proxy, gcs_process, source):
        digest = sha256(source.read_bytes())
        upload = store.begin("large", source.stat().st_size, digest, PART, None)
        foreign = {**upload.token, "session": upload.token["session"].replace(str(proxy.port), str(gcs_process.port))}
        again = store.begin("large", source.stat().st_size, digest, PART, foreign)
        assert str(proxy.port) in again.token["session"]

    def test_a_file_that_grows_meanwhile(self, direct, source):
        data = source.read_bytes()
        upload = direct.begin("large", source.stat().st_size, sha256(data), PART, None)
        with source.open("ab") as file:
            file.write(b"more")
        for number in range(3):
            upload.put(number, data[number * PART : (number + 1) * PART])
        assert upload.finish().size == len(data)
        assert bytes(direct.get("large")[1]) == data

    def test_parts_out_of_order_are_a_bug(self, direct, source):
        upload = direct.begin("large", source.stat().st_size, sha256(source.read_bytes()), PART, None)
        with pytest.raises(ValueError, match="part 1"):
            upload.put(1, b"x")


class Test_requests:
    def test_a_copy_takes_as_many_calls_as_it_takes(self, direct, gcs_process, monkeypatch):
        direct.put("one", b"data" * 100)
        monkeypatch.setattr(gcs_process.storage, "rewrite_calls", 3)
        before = len(gcs_process.requests)
        direct.copy("one", "two")
        assert len(gcs_process.requests) - before == 3
        assert bytes(direct.get("two")[1]) == b"data" * 100

    def test_a_listing_of_several_pages(self, direct, gcs_process, monkeypatch):
        monkeypatch.setattr(gcs_process.storage, "page", 3)
        keys = [f"{number:02}" for number in range(10)]
        for key in keys:
            direct.put(key, b"x")
        assert [info.key for info in direct.list()] == keys
        assert [info.key for info in direct.list(after="04")] == keys[5:]

    def test_the_key_of_the_encryption_goes_along(self, gcs_server, gcs_process, opened, source):
        store = opened(gcs_server, kms_key=KMS_KEY)
        store.put("small", b"x")
        store.copy("small", "copy")
        upload = store.begin("large", source.stat().st_size, sha256(source.read_bytes()), PART, None)
        send(upload, source)
        upload.finish()
        bucket, _, prefix = store.url.removeprefix("gs://").partition("/")
        for key in ("small", "copy", "large"):
            resource = gcs_process.storage.buckets[bucket][f"{prefix}/{key}"].resource
            assert resource["kmsKeyName"].startswith(KMS_KEY), key

    def test_what_is_stored_compressed_comes_as_it_is(self, direct, gcs_process):
        direct.put("key", b"not really gzip")
        bucket, _, prefix = direct.url.removeprefix("gs://").partition("/")
        gcs_process.storage.buckets[bucket][f"{prefix}/key"].resource["contentEncoding"] = "gzip"
        assert bytes(direct.get("key")[1]) == b"not really gzip"

    def test_a_put_is_one_request_and_so_is_a_get(self, direct, gcs_process):
        direct.put("warm", b"up")
        before = len(gcs_process.requests)
        direct.put("key", b"x" * MIB)
        direct.get("key")
        direct.get("key", 1, 2)
        direct.head("key")
        direct.delete("key")
        assert len(gcs_process.requests) - before == 5


class Test_credentials:
    def test_an_expired_token_is_replaced(self, direct, gcs_process):
        direct.put("key", b"x")
        gcs_process.expire_tokens()
        direct.put("key", b"y" * MIB)
        assert bytes(direct.get("key")[1]) == b"y" * MIB

    def test_the_content_of_the_file_in_a_variable(self, gcs_server, gcs_process, opened):
        content = json.dumps(gcs_process.service_account())
        store = opened(gcs_server, environ={"GOOGLE_APPLICATION_CREDENTIALS_JSON": content})
        store.put("key", b"x")
        assert store.head("key").size == 1

    @pytest.mark.parametrize(
        "content", ["secret", "[]", "{}", '{"type": "secret"}', '{"type": "service_account", "private_key": "secret"}']
    )
    def test_a_variable_with_something_else(self, gcs_server, opened, content):
        with pytest.raises(AccessDenied) as caught:
            opened(gcs_server, environ={"GOOGLE_APPLICATION_CREDENTIALS_JSON": content})
        assert "GOOGLE_APPLICATION_CREDENTIALS_JSON" in str(caught.value)
        assert "secret" not in str(caught.value)
        assert caught.value.__cause__ is None

    @pytest.mark.parametrize("environ", [{}, {"GOOGLE_APPLICATION_CREDENTIALS": "/no/such/file"}])
    def test_none_at_all(self, gcs_server, opened, environ, tmp_path):
        # HOME without gcloud's files, and a machine that is not one of Google's
        alone = {**environ, "HOME": str(tmp_path), "CLOUDSDK_CONFIG": str(tmp_path), "NO_GCE_CHECK": "true"}
        with pytest.raises(AccessDenied, match="GOOGLE_APPLICATION_CREDENTIALS"):
            opened(gcs_server, "bucket-x", environ=alone, endpoint_url="https://storage.googleapis.com")

    def test_a_server_on_this_machine_may_want_none(self, opened, gcs_server):
        with GcsServer(anonymous=True) as server:
            server.storage.make_bucket("bucket-a")
            store = opened(gcs_server, "bucket-a", environ={"STORAGE_EMULATOR_HOST": server.url}, endpoint_url=None)
            store.put("key", b"x")
            assert [info.key for info in store.list()] == ["key"]

    def test_who_has_none_where_some_are_wanted(self, gcs_server, opened):
        store = opened(gcs_server, environ={})
        for call in (lambda: store.get("key"), lambda: list(store.list()), lambda: store.put("key", b"x")):
            with pytest.raises(AccessDenied, match="GOOGLE_APPLICATION_CREDENTIALS"):
                call()

    def test_without_permission(self, gcs_server, gcs_process, opened, monkeypatch):
        bucket = gcs_server.make_bucket()
        store = opened(gcs_server, bucket)
        monkeypatch.setattr(gcs_process, "denied", {bucket})
        for call in (lambda: store.get("key"), lambda: list(store.list()), lambda: store.delete("key")):
            with pytest.raises(AccessDenied, match=r"roles/storage\.objectUser"):
                call()

    def test_an_emulator_elsewhere_needs_tls(self, gcs_server, opened):
        with pytest.raises(SettingsError, match="TLS"):
            opened(gcs_server, "bucket-x", environ={"STORAGE_EMULATOR_HOST": "10.0.0.1:4443"}, endpoint_url=None)

    def test_nothing_secret_is_logged_or_shown(self, direct, gcs_process, caplog, source):
        caplog.set_level(logging.DEBUG)
        upload = direct.begin("large", source.stat().st_size, sha256(source.read_bytes()), PART, None)
        send(upload, source)
        with pytest.raises(ObjectNotFound) as caught:
            direct.get("nothing")
        told = caplog.text + f"{direct!r} {upload!r} {caught.value!r} {caught.value}"
        identifier = re.search("upload_id=([^&]+)", upload.token["session"])[1]
        for secret in (identifier, *gcs_process.tokens):
            assert secret not in told


class Test_answers:
    @pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504])
    def test_a_busy_server_is_transient(self, store, proxy, status):
        for call in (lambda: store.get("key"), lambda: store.put("key", b"x"), lambda: list(store.list())):
            proxy.answer(status, match="storage")
            with pytest.raises(TransientError):
                call()

    def test_a_limit_is_no_refusal(self, store, proxy):
        error = {"code": 403, "message": "too fast", "errors": [{"reason": "rateLimitExceeded"}]}
        proxy.answer(403, body=json.dumps({"error": error}), match="storage")
        with pytest.raises(TransientError, match="too fast"):
            store.head("key")

    def test_a_404_that_says_nothing(self, store, proxy):
        proxy.answer(404, body="?", match="alt=media")
        with pytest.raises(ObjectNotFound):
            store.get("key")
        proxy.answer(404, body="?", times=2, match="storage")
        with pytest.raises(BucketNotFound):
            store.head("key")

    def test_an_object_that_is_gone_is_deleted(self, store, proxy):
        proxy.answer(412, body="?", match="^DELETE")
        store.delete("key", if_version="1")

    def test_a_version_of_another_provider(self, direct):
        direct.put("key", b"x")
        with pytest.raises(PreconditionFailed):
            direct.put("key", b"y", if_version='"0x8DC"')

    def test_nobody_is_there(self, store, proxy):
        proxy.refuse()
        with pytest.raises(TransientError) as caught:
            store.get("key")
        assert str(caught.value.where) == f"get {store.url}/key"

    def test_a_name_that_nobody_knows(self, gcs_server, opened):
        store = opened(gcs_server, "bucket-x", endpoint_url="http://no-such-host.invalid", allow_http=True)
        with pytest.raises(TransientError, match="name cannot be resolved"):
            store.get("key")

    @pytest.mark.parametrize("direction", ["up", "down"])
    def test_a_server_that_falls_silent(self, store, proxy, monkeypatch, direction):
        store.put("key", os.urandom(MIB))
        monkeypatch.setattr(http, "TIMEOUT", (0.5, 0.5))
        proxy.stall(direction, 1000, match="^GET" if direction == "down" else "^POST")
        with pytest.raises(TransientError, match=r"in time|connection failed"):
            store.get("key") if direction == "down" else store.put("key", os.urandom(8 * MIB))
