"""Azure Blob Storage for the tests: Azurite, which scripts/test.sh installs with npm."""

import base64
import itertools
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers.base import Server
from tests.servers.processes import end, free_ports

AZURITE = Path(__file__).parents[2] / ".cache" / "azurite" / "node_modules" / ".bin" / "azurite-blob"
ACCOUNT = "testaccount"
_SECONDS_TO_START = 120


@pytest.fixture(scope="session")
def azure_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Azurite with one account. The wrong credentials are another key."""
    if not AZURITE.exists() or shutil.which("node") is None:
        pytest.skip(f"there is no {AZURITE}: run scripts/test.sh, with npm on PATH")
    key, wrong = (base64.b64encode(secrets.token_bytes(64)).decode() for _ in range(2))
    folder = tmp_path_factory.mktemp("azurite")
    (port,) = free_ports(1)
    command = [str(AZURITE), "--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", str(folder), "--silent"]
    process = subprocess.Popen(
        [*command, "--disableTelemetry", "--skipApiVersionCheck"],
        env={**os.environ, "AZURITE_ACCOUNTS": f"{ACCOUNT}:{key}"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    endpoint = f"http://127.0.0.1:{port}/{ACCOUNT}"
    numbers = itertools.count()

    def make_bucket() -> str:
        from azure.storage.blob import BlobServiceClient

        container = f"container-{next(numbers)}"
        credential = {"account_name": ACCOUNT, "account_key": key}
        with BlobServiceClient(endpoint, credential=credential) as service:
            service.create_container(container).close()
        return container

    try:
        _wait(port, process)
        account = {"AZURE_STORAGE_ACCOUNT": ACCOUNT}
        right, other = {**account, "AZURE_STORAGE_KEY": key}, {**account, "AZURE_STORAGE_KEY": wrong}
        yield Server("azure", endpoint, right, make_bucket, other)
    finally:
        end(process)


def _wait(port: int, process: "subprocess.Popen[bytes]") -> None:
    until = time.monotonic() + _SECONDS_TO_START
    while time.monotonic() < until and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    pytest.fail("Azurite did not start")
