"""A store behind a proxy, and a file of two parts."""

import hashlib
import os

import pytest

from tests.servers.proxy import Proxy

PART = 5 << 20
REFUSED = "<?xml version='1.0'?><Error><Code>{}</Code><Message>{}</Message></Error>"


@pytest.fixture
def proxied(s3_server, opened):
    """`proxied(**settings)`: a store behind a proxy, and the proxy."""
    host, _, port = s3_server.endpoint.removeprefix("http://").partition(":")
    with Proxy(host, int(port)) as proxy:
        yield lambda **settings: (opened(s3_server, endpoint_url=proxy.endpoint, **settings), proxy)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source"
    path.write_bytes(os.urandom(1 << 16) * 128)
    return path


def digest(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def send(upload, path) -> None:
    data = path.read_bytes()
    for number, start in enumerate(range(0, len(data), upload.part_size)):
        upload.put(number, data[start : start + upload.part_size])
