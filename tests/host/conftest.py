"""A metadata service on loopback, and machines that are only files."""

import pytest

from tests.servers.metadata import serve
from wmtp_worker.host.stop import StopRequest


@pytest.fixture
def server():
    with serve() as running:
        yield running


@pytest.fixture
def stop():
    return StopRequest()


@pytest.fixture
def machine(tmp_path):
    """The root of a file system that holds these files, by name."""

    def build(files):
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content)
        return tmp_path

    return build
