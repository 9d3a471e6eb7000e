"""The servers that every kind of store is tried against, and stores opened as a worker opens them."""

import importlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.servers.base import Server
from wmtp_worker.settings import CloudSettings
from wmtp_worker.storage.objects import ObjectStore

MODULES = {"local": "directory", "s3": "s3", "gcs": "gcs", "azure": "azure"}
_numbers = itertools.count()
_clouds: dict[int, CloudSettings] = {}


@pytest.fixture(params=["directory", "s3", "gcs", "azure"])
def server(request: pytest.FixtureRequest) -> Server:
    """Each kind of server in turn."""
    found: Server = request.getfixturevalue(f"{request.param}_server")
    return found


@pytest.fixture
def opened(use_environ: Callable[..., None]) -> Iterator[Callable[..., ObjectStore]]:
    """`opened(server, bucket=…, environ=…, **settings)`: the provider's own store, which never tries again.

    Without a bucket, a new prefix of the bucket that all tests share. Everything is closed at the end.
    """
    stores: list[ObjectStore] = []

    def open_one(server: Server, bucket: str | None = None, environ: Any = None, **settings: Any) -> ObjectStore:
        use_environ(server.environ if environ is None else environ)
        # reading settings takes longer than most tests
        if id(server) not in _clouds:
            _clouds[id(server)] = server.cloud(server.make_bucket())
        if bucket is None:
            settings.setdefault("prefix", f"test-{next(_numbers)}")
        else:
            settings["bucket"] = bucket
        cloud = CloudSettings(**{**_clouds[id(server)].model_dump(), **settings})
        module = importlib.import_module(f"wmtp_worker.storage.{MODULES[server.provider]}")
        store: ObjectStore = module.open_store(cloud)
        stores.append(store)
        return store

    yield open_one
    for store in stores:
        store.close()


@pytest.fixture
def store(server: Server, opened: Callable[..., ObjectStore]) -> ObjectStore:
    """An empty part of a bucket of each server."""
    return opened(server)


@pytest.fixture
def again(server: Server, store: ObjectStore, opened: Callable[..., ObjectStore]) -> Callable[[], ObjectStore]:
    """Another instance for the same place, as another process has it."""
    prefix = store.url.rstrip("/").rpartition("/")[2]
    return lambda: opened(server, prefix=prefix)
