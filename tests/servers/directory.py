"""Folders as buckets."""

from pathlib import Path

import pytest

from tests.servers.base import Server


@pytest.fixture(scope="session")
def directory_server(tmp_path_factory) -> Server:
    """Buckets are folders below pytest's temporary one."""
    folder: Path = tmp_path_factory.mktemp("buckets")

    def make_bucket() -> str:
        bucket = folder / f"bucket-{len(list(folder.iterdir()))}"
        bucket.mkdir()
        return str(bucket)

    return Server("local", None, {}, make_bucket)
