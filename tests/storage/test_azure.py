"""Azure Blob Storage beyond what all buckets have in common: blocks, credentials, and the order of listings."""

import hashlib
import logging
import os
import ssl
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
import urllib3.exceptions
from azure.storage.blob import BlobClient, ContainerSasPermissions, generate_container_sas
from hypothesis import given
from hypothesis import strategies as st

from tests.servers.azure import ACCOUNT
from tests.servers.proxy import Proxy
from wmtp_worker.errors import (
    AccessDenied,
    BucketNotFound,
    ObjectNotFound,
    SettingsError,
    StorageError,
    TransientError,
)
from wmtp_worker.storage import azure_copy, http
from wmtp_worker.storage.azure import _in_order
from wmtp_worker.storage.azure_upload import MOST_BLOCKS

PART = 1 << 20


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def proxy(azure_server):
    with Proxy("127.0.0.1", urlsplit(azure_server.endpoint).port) as proxy:
        yield proxy


@pytest.fixture
def direct(azure_server, opened):
    """An empty part of a container, without a proxy."""
    return opened(azure_server)


@pytest.fixture
def store(azure_server, opened, direct, proxy):
    """The same place as `direct`, through the proxy, whose address lacks the account's name."""
    return opened(azure_server, prefix=direct.url.rpartition("/")[2], endpoint_url=proxy.endpoint)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "large"
    path.write_bytes(os.urandom(2 * PART + PART // 2 + 1))
    return path


@pytest.fixture
def connection_string(azure_server):
    key = azure_server.environ["AZURE_STORAGE_KEY"]
    return f"AccountName={ACCOUNT};AccountKey={key};BlobEndpoint={azure_server.endpoint};"


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
        store.put("key", b"old")
        proxy.flip("up", 5000, match="^PUT")
        with pytest.raises(TransientError, match="changed on the way"):
            store.put("key", os.urandom(10_000))
        assert bytes(store.get("key")[1]) == b"old"

    def test_a_part_neither(self, store, proxy, source):
        upload = store.begin("large", source.stat().st_size, sha256(source.read_bytes()), PART, None)
        proxy.flip("up", 5000, match="^PUT .*comp=block&")
        with pytest.raises(TransientError, match="changed on the way"):
            send(upload, source)
        assert send(upload, source) == [0, 1, 2]
        upload.finish()
        assert bytes(store.get("large")[1]) == source.read_bytes()

    def test_a_body_that_breaks_off_is_transient(self, store, proxy):
        store.put("key", os.urandom(10_000))
        # the SDK itself asks three times
        proxy.cut("down", 5000, match="^GET", times=3)
        with pytest.raises(TransientError):
            store.get("key", 0, 9000)

    def test_what_azure_knows_is_in_the_listing(self, direct, source):
        direct.put("small", b"data")
        upload = direct.begin("large", source.stat().st_size, sha256(source.read_bytes()), PART, None)
        send(upload, source)
        upload.finish()
        large, small = direct.list()
        assert (small.sha256, small.md5) == (sha256(b"data"), hashlib.md5(b"data").hexdigest())
        assert (large.sha256, large.md5) == (sha256(source.read_bytes()), None)


class Test_blocks:
    def test_only_parts_that_are_not_there_are_sent(self, store, proxy, azure_server, opened, source):
        data = source.read_bytes()
        upload = store.begin("large", source.stat().st_size, sha256(data), PART, None)
        upload.put(2, data[2 * PART :])
        proxy.cut("up", PART // 2, match="^PUT", reset=True)
        with pytest.raises(TransientError):
            upload.put(0, data[:PART])
        again = opened(azure_server, prefix=store.url.rpartition("/")[2])
        upload = again.begin("large", source.stat().st_size, sha256(data), PART, {})
        assert send(upload, source) == [0, 1]
        assert upload.finish().sha256 == sha256(data)
        assert bytes(again.get("large")[1]) == data

    def test_an_end_whose_answer_was_lost_can_be_repeated(self, store, proxy, source):
        upload = store.begin("large", source.stat().st_size, sha256(source.read_bytes()), PART, None)
        send(upload, source)
        proxy.lose_response(match="comp=blocklist")
        with pytest.raises(TransientError):
            upload.finish()
        assert upload.finish().version == store.head("large").version
        assert bytes(store.get("large")[1]) == source.read_bytes()

    def test_blocks_that_another_writer_threw_away(self, store, proxy, source):
        upload = store.begin("large", source.stat().st_size, sha256(source.read_bytes()), PART, None)
        send(upload, source)
        # Azurite keeps them
        body = "<Error><Code>InvalidBlockList</Code><Message>gone</Message></Error>"
        proxy.answer(400, body=body, match="comp=blocklist")
        with pytest.raises(ObjectNotFound, match="gone"):
            upload.finish()
        assert list(store.list()) == []

    def test_what_is_read_meanwhile_is_the_old_object(self, direct, source):
        old = direct.put("large", b"old")
        upload = direct.begin("large", source.stat().st_size, sha256(source.read_bytes()), PART, None)
        send(upload, source)
        assert direct.head("large") == old
        upload.finish()
        assert direct.head("large").version != old.version

    @pytest.mark.parametrize("size", [0, 1, PART - 1, PART, PART + 1])
    def test_every_size_ends_right(self, direct, tmp_path, size):
        path = tmp_path / "file"
        path.write_bytes(os.urandom(size))
        upload = direct.begin("large", path.stat().st_size, sha256(path.read_bytes()), PART, None)
        send(upload, path)
        assert upload.finish().size == size
        assert bytes(direct.get("large")[1]) == path.read_bytes()

    def test_no_more_blocks_than_azure_takes(self, direct, tmp_path):
        path = tmp_path / "sparse"
        with path.open("wb") as file:
            file.truncate(MOST_BLOCKS * PART + 1)
        assert direct.begin("large", path.stat().st_size, sha256(b""), PART, None).part_size == PART + 1

    def test_the_scope_of_the_encryption_goes_along(self, azure_server, opened, proxy, source):
        store = opened(azure_server, endpoint_url=proxy.endpoint, kms_key="ours")
        store.put("small", b"x")
        upload = store.begin("large", source.stat().st_size, sha256(source.read_bytes()), PART, None)
        send(upload, source)
        upload.finish()
        written = [head for head in proxy.heads if head.startswith("PUT")]
        assert len(written) == 5
        assert all("x-ms-encryption-scope: ours" in head for head in written)


class Test_credentials:
    def test_a_connection_string(self, azure_server, opened, connection_string, proxy):
        for endpoint in (None, azure_server.endpoint, f"{proxy.endpoint}/{ACCOUNT}"):
            environ = {"AZURE_STORAGE_CONNECTION_STRING": connection_string}
            store = opened(azure_server, environ=environ, endpoint_url=endpoint)
            store.put("key", b"x")
            assert store.head("key").size == 1
        assert any(line.startswith("PUT") for line in proxy.requests)

    @pytest.mark.parametrize("question", ["", "?"])
    def test_a_shared_access_signature(self, azure_server, opened, question):
        container = azure_server.make_bucket()

        def with_permission(permission: str, hours: int = 1):
            token = generate_container_sas(
                ACCOUNT,
                container,
                azure_server.environ["AZURE_STORAGE_KEY"],
                permission=ContainerSasPermissions.from_string(permission),
                expiry=datetime.now(UTC) + timedelta(hours=hours),
            )
            return opened(azure_server, container, environ={"AZURE_STORAGE_SAS_TOKEN": question + token})

        store = with_permission("rwdl")
        store.put("key", b"x")
        store.copy("key", "copy")
        assert [info.key for info in store.list()] == ["copy", "key"]
        store.delete("key")
        reader = with_permission("r")
        assert bytes(reader.get("copy")[1]) == b"x"
        for denied in (lambda: reader.put("key", b"x"), lambda: list(reader.list()), lambda: reader.delete("copy")):
            with pytest.raises(AccessDenied) as caught:
                denied()
            assert "sig=" not in str(caught.value)
        with pytest.raises(AccessDenied):
            with_permission("rwdl", -1).get("copy")

    @pytest.mark.parametrize(
        "environ",
        [
            {"AZURE_STORAGE_CONNECTION_STRING": "secret"},
            {"AZURE_STORAGE_CONNECTION_STRING": "AccountKey=secret"},
            {},
            {"AZURE_STORAGE_ACCOUNT": ACCOUNT},
        ],
    )
    def test_what_is_none(self, azure_server, opened, environ):
        with pytest.raises(AccessDenied) as caught:
            opened(azure_server, environ=environ)
        assert "AZURE_STORAGE_CONNECTION_STRING" in str(caught.value)
        assert "secret" not in f"{caught.value} {caught.value.__cause__}"

    def test_no_account(self, azure_server, opened):
        with pytest.raises(AccessDenied, match="AZURE_STORAGE_ACCOUNT"):
            opened(azure_server, environ={"AZURE_STORAGE_KEY": "a2V5"}, endpoint_url=None)

    def test_a_key_that_is_no_key(self, azure_server, opened):
        store = opened(azure_server, environ={"AZURE_STORAGE_ACCOUNT": ACCOUNT, "AZURE_STORAGE_KEY": "secret!"})
        with pytest.raises(AccessDenied) as caught:
            store.get("key")
        assert "secret" not in str(caught.value)

    def test_an_account_elsewhere_needs_tls(self, azure_server, opened, connection_string):
        elsewhere = connection_string.replace("127.0.0.1", "10.0.0.1")
        with pytest.raises(SettingsError, match="TLS"):
            opened(azure_server, environ={"AZURE_STORAGE_CONNECTION_STRING": elsewhere}, endpoint_url=None)

    def test_without_any_identity(self, azure_server, opened, monkeypatch, tmp_path):
        # DefaultAzureCredential without anything to find
        environ = {
            "AZURE_STORAGE_ACCOUNT": ACCOUNT,
            "HOME": str(tmp_path),
            "PATH": "",
            "AZURE_TOKEN_CREDENTIALS": "dev",
        }
        store = opened(azure_server, environ=environ, endpoint_url="https://127.0.0.1:1/")
        with pytest.raises(AccessDenied, match="DefaultAzureCredential"):
            store.get("key")

    def test_nothing_secret_is_logged_or_shown(self, azure_server, direct, opened, caplog):
        caplog.set_level(logging.DEBUG)
        container = direct.url.removeprefix("az://").partition("/")[0]
        key = azure_server.environ["AZURE_STORAGE_KEY"]
        sas = generate_container_sas(
            ACCOUNT, container, key, permission="rwdl", expiry=datetime.now(UTC) + timedelta(hours=1)
        )
        store = opened(azure_server, environ={"AZURE_STORAGE_SAS_TOKEN": sas})
        store.put("key", b"x")
        store.copy("key", "copy")
        with pytest.raises(ObjectNotFound) as caught:
            store.get("nothing")
        told = caplog.text + f"{store!r} {direct!r} {caught.value!r} {caught.value}"
        signature = sas.partition("sig=")[2].partition("&")[0]
        for secret in (signature, key, "SharedKey"):
            assert secret not in told


class Test_answers:
    @pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504])
    def test_a_busy_server_is_transient_and_asked_once(self, store, proxy, status):
        for call in (lambda: store.get("key"), lambda: store.put("key", b"x"), lambda: list(store.list())):
            before = len(proxy.requests)
            proxy.answer(status)
            with pytest.raises(TransientError):
                call()
            assert len(proxy.requests) == before + 1

    def test_a_gateway_in_between(self, store, proxy):
        proxy.answer(502, body="<html><body>bad gateway</body></html>")
        with pytest.raises(TransientError):
            store.get("key")

    def test_a_404_that_says_nothing(self, store, proxy):
        proxy.answer(404, body="?", match="key")
        with pytest.raises(ObjectNotFound):
            store.get("key")
        proxy.answer(404, body="?", match="^GET .*key")
        proxy.answer(404, body="?", match="comp=list")
        with pytest.raises(BucketNotFound):
            store.get("key")

    def test_a_clock_that_is_wrong(self, store, proxy):
        body = "<Error><Code>AuthenticationFailed</Code><Message>Request date header too old</Message></Error>"
        proxy.answer(403, body=body)
        with pytest.raises(AccessDenied, match="clock"):
            store.get("key")

    def test_nobody_is_there(self, store, proxy):
        proxy.refuse()
        with pytest.raises(TransientError) as caught:
            store.get("key")
        assert str(caught.value.where) == f"get {store.url}/key"

    def test_a_name_that_nobody_knows(self, azure_server, opened):
        store = opened(azure_server, "container", endpoint_url="http://no-such-host.invalid", allow_http=True)
        with pytest.raises(TransientError, match="name cannot be resolved"):
            store.get("key")

    @pytest.mark.parametrize("direction", ["up", "down"])
    def test_a_server_that_falls_silent(self, store, proxy, monkeypatch, direction):
        store.put("key", os.urandom(PART))
        monkeypatch.setattr(http, "TIMEOUT", (0.5, 0.5))
        proxy.stall(direction, 1000, match="^GET" if direction == "down" else "^PUT", times=3)
        with pytest.raises(TransientError, match=r"in time|connection failed"):
            store.get("key") if direction == "down" else store.put("key", os.urandom(8 * PART))

    def test_a_copy_that_takes_its_time(self, direct, monkeypatch):
        direct.put("key", b"x")
        start = BlobClient.start_copy_from_url
        monkeypatch.setattr(
            BlobClient, "start_copy_from_url", lambda *a, **k: {**start(*a, **k), "copy_status": "pending"}
        )
        direct.copy("key", "copy")
        assert direct.head("copy").sha256 == sha256(b"x")

    @pytest.mark.parametrize("size", [1000, 1001, 2500])
    def test_a_copy_into_an_encryption_scope(self, azure_server, direct, opened, monkeypatch, size):
        # Azurite knows no scopes, and cannot stage a block from an address: both are played here
        calls, data = [], os.urandom(size)

        def start(new, url, **options):
            calls.append(("copy", options.pop("encryption_scope"), options["requires_sync"]))
            return copy_from_url(new, url, **options)

        def stage(new, name, url, offset, length, **options):
            calls.append(("block", options["encryption_scope"], length))
            assert "sig=" in url
            new.stage_block(name, BlobClient.from_blob_url(url).download_blob(offset, length).readall())

        def commit(new, blocks, **options):
            return commit_blocks(new, blocks, metadata=options["metadata"])

        copy_from_url, commit_blocks = BlobClient.start_copy_from_url, BlobClient.commit_block_list
        direct.put("key", data)
        for name, played in (("start_copy_from_url", start), ("stage_block_from_url", stage)):
            monkeypatch.setattr(BlobClient, name, played)
        monkeypatch.setattr(BlobClient, "commit_block_list", commit)
        monkeypatch.setattr(azure_copy, "_AT_ONCE", 1000)
        monkeypatch.setattr(azure_copy, "_BLOCK", 1000)
        store = opened(azure_server, prefix=direct.url.rpartition("/")[2], kms_key="scope")
        store.copy("key", "other")
        blocks = [("block", "scope", min(1000, size - start)) for start in range(0, size, 1000)]
        assert calls == ([("copy", "scope", True)] if size == 1000 else blocks)
        assert bytes(direct.get("other")[1]) == data
        assert direct.head("other").sha256 == sha256(data)

    @pytest.mark.parametrize("code", ["SnapshotsPresent", "InvalidBlobType", "BlobArchived"])
    def test_a_conflict_that_never_passes_is_no_transient_one(self, store, proxy, code):
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>"
        proxy.answer(409, body=body, headers=f"x-ms-error-code: {code}\r\n")
        with pytest.raises(StorageError, match=code) as caught:
            store.put("key", b"x")
        assert not isinstance(caught.value, TransientError)

    def test_a_certificate_that_is_not_trusted(self):
        inner = ssl.SSLCertVerificationError(1, "self-signed certificate")
        outer = urllib3.exceptions.MaxRetryError(None, "/", urllib3.exceptions.SSLError(inner))
        error = http.network_error(outer, "get az://c/key")
        assert isinstance(error, AccessDenied)
        assert "REQUESTS_CA_BUNDLE" in str(error)


LETTERS = "a/-\ud7ff\ue000\uffff\U00010000\U0001f999"


class Test_order:
    @given(st.sets(st.text(LETTERS, min_size=1, max_size=4), max_size=30))
    def test_by_utf8_whatever_the_server_sorts_by(self, names):
        expected = sorted(names, key=str.encode)
        for order in (lambda name: name.encode("utf-16-be"), str.encode):
            blobs = [SimpleNamespace(name=name) for name in sorted(names, key=order)]
            assert [blob.name for blob in _in_order(blobs)] == expected

    def test_nothing_is_held_back_without_need(self):
        taken = []

        def blobs():
            for number in range(10):
                taken.append(number)
                yield SimpleNamespace(name=f"{number}ä")

        next(_in_order(blobs()))
        assert taken == [0]
