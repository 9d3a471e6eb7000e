"""A bucket and a work directory, new for each test."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from wmtp_worker.settings import Settings, load
from wmtp_worker.storage.open import open_store
from wmtp_worker.storage.transfer import Transfer


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    return tmp_path / "work"


@pytest.fixture
def settings(workdir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Settings]:
    """`settings("key=value", …)`; the current directory is an empty one."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    fixed = [f"run.workdir={workdir}", "cloud.patience=0"]
    return lambda *overrides: load(overrides=[*fixed, *overrides], environ={})


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    """A folder that is the bucket: what lies in it are its objects."""
    folder = tmp_path / "bucket"
    folder.mkdir()
    return folder


@pytest.fixture
def transfer(bucket: Path, workdir: Path, settings: Callable[..., Settings]) -> Iterator[Transfer]:
    cloud = settings("cloud.provider=local", f"cloud.bucket={bucket}").cloud
    store = open_store(cloud)
    with Transfer(store, workdir / ".sync") as transfer:
        yield transfer
    store.close()


@pytest.fixture
def nothing() -> Callable[[], None]:
    """A check that never stops anything."""
    return lambda: None
