"""A folder as bucket, files to send, and a `Transfer` with parts so small that few bytes make many."""

import contextlib
import gc
import itertools
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.servers.base import Server
from wmtp_worker.errors import Interrupted
from wmtp_worker.storage.objects import ObjectStore
from wmtp_worker.storage.transfer import Transfer

PART = 64 << 10


@pytest.fixture(autouse=True)
def _nothing_leaks(tmp_path: Path) -> Iterator[None]:
    """After each test its threads, open files and connections to the journal are gone."""
    yield
    deadline = time.monotonic() + 60
    while (left := leaks(tmp_path)) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.05)
    assert not left


def leaks(folder: Path) -> list[str]:
    """Threads of a transfer, and open files below a folder."""
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("transfer")]
    for name in os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd") else ():
        with contextlib.suppress(OSError):
            path = os.readlink(f"/proc/self/fd/{name}")
            left += [path] if path.startswith(f"{folder}/") else []
    return left


@pytest.fixture
def bucket(directory_server: Server, opened: Callable[..., ObjectStore]) -> ObjectStore:
    """An empty bucket that is a folder."""
    return opened(directory_server, bucket=directory_server.make_bucket())


@pytest.fixture
def transfers(tmp_path: Path) -> Iterator[Callable[..., Transfer]]:
    """`transfers(store, **settings)`: with parts of 64 KiB and a shared journal; closed at the end."""
    made: list[Transfer] = []

    def make(store: Any, **settings: Any) -> Transfer:
        made.append(Transfer(store, settings.pop("state", tmp_path / "state"), **{"part_size": PART, **settings}))
        return made[-1]

    yield make
    for transfer in made:
        transfer.close()


@pytest.fixture
def transfer(transfers: Callable[..., Transfer], bucket: ObjectStore) -> Transfer:
    """Between `bucket` and anywhere."""
    return transfers(bucket)


@pytest.fixture
def interrupted_download(transfers: Callable[..., Transfer]) -> Callable[..., None]:
    """`interrupted_download(bucket, key, path, parts)`: stopped when so many parts are there, one after the other."""

    def download(bucket: Any, key: str, path: Path, parts: int) -> None:
        served = itertools.count()
        get = bucket.get

        def get_some(*arguments: Any) -> Any:
            if next(served) >= parts:
                raise Interrupted("stopped by a test")
            return get(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bucket, "get", get_some)
            with pytest.raises(Interrupted):
                transfers(bucket, concurrency=1).download_file(key, path)

    return download


@pytest.fixture
def make_file() -> Callable[..., bytes]:
    """`make_file(path, size, seed)`: write random bytes, and return them."""

    def make(path: Path, size: int, seed: int = 0) -> bytes:
        data = random.Random(seed).randbytes(size)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return data

    return make


@pytest.fixture
def contents() -> Callable[[Path], dict[str, bytes]]:
    """Every file below a folder, hidden ones too, by relative path."""

    def read(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    return read
