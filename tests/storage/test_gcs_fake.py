"""The data path of Google Cloud Storage on a server that is not ours: fake-gcs-server."""

import hashlib
import os

import pytest

from tests.storage.test_conformance import UNUSUAL
from wmtp_worker.errors import BucketNotFound, ObjectNotFound, PreconditionFailed
from wmtp_worker.storage.retry import RetryingStore

PART = 1 << 20


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def store(fake_gcs_server, opened):
    """An empty part of a bucket, with the worker's retries: after some errors this server drops the connection."""
    return RetryingStore(opened(fake_gcs_server), patience=10)


@pytest.fixture
def source(tmp_path):
    """A file of two and a half parts."""
    path = tmp_path / "large"
    path.write_bytes(os.urandom(2 * PART + PART // 2 + 1))
    return path


@pytest.mark.parametrize("key", [key for key in UNUSUAL if "\\" not in key])
def test_keys(store, key):
    store.put(key, key.encode())
    assert store.head(key).sha256 == sha256(key.encode())
    assert bytes(store.get(key)[1]) == key.encode()
    assert [info.key for info in store.list()] == [key]
    store.copy(key, "copies/" + key)
    assert store.head("copies/" + key).sha256 == sha256(key.encode())
    store.delete(key)
    store.delete(key)
    with pytest.raises(ObjectNotFound):
        store.get(key)


@pytest.mark.parametrize(("start", "length"), [(0, None), (0, 1), (10, 10), (90, None), (90, 500), (500, 5)])
def test_ranges(store, start, length):
    data = os.urandom(100)
    store.put("key", data)
    info, got = store.get("key", start, length)
    assert bytes(got) == (data[start:] if length is None else data[start : start + length])
    assert (info.size, info.version) == (100, store.head("key").version)


def test_only_if_absent(store):
    store.put("key", b"x", if_absent=True)
    with pytest.raises(PreconditionFailed):
        store.put("key", b"y", if_absent=True)
    assert bytes(store.get("key")[1]) == b"x"


def test_a_large_object(store, source):
    upload = store.begin("large", source.stat().st_size, sha256(source.read_bytes()), PART, None)
    for number, start in enumerate(range(0, source.stat().st_size, PART)):
        upload.put(number, source.read_bytes()[start : start + PART])
    assert upload.finish().sha256 == sha256(source.read_bytes())
    assert bytes(store.get("large")[1]) == source.read_bytes()


def test_no_bucket(fake_gcs_server, opened):
    store = opened(fake_gcs_server, "no-such-bucket")
    for call in (lambda: store.get("key"), lambda: list(store.list()), lambda: store.put("key", b"x")):
        with pytest.raises(BucketNotFound):
            call()
