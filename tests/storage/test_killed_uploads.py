"""A checkpoint whose upload was killed half-way: the next process, under the next epoch, sends only the rest."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.servers.proxy import Proxy
from wmtp_worker.storage import CloudSync
from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.storage.seal import seal_folder

SIZE = 48 << 20  # six parts


@pytest.fixture(params=["s3", "gcs"])
def server(request):
    """Those where unfinished uploads are on the server: found by their key, or by what this machine noted."""
    return request.getfixturevalue(f"{request.param}_server")


def test_it_is_finished_where_it_was_begun(server, use_environ, tmp_path):
    paths, bucket = RunPaths(tmp_path / "work", "tiny"), server.make_bucket()
    paths.step(10).mkdir(parents=True)
    (paths.step(10) / "model.safetensors").write_bytes(random.Random(1).randbytes(SIZE))
    seal_folder(paths.step(10))
    use_environ(server.environ)
    parts = urlsplit(server.endpoint)
    with Proxy(parts.hostname, parts.port) as proxy:
        changes = {"endpoint_url": f"{proxy.endpoint}{parts.path}"}
        variables = server.variables(bucket, bandwidth=8, concurrency=1, **changes)
        environ = {**os.environ, **variables, "WMTP_WORKDIR": str(paths.workdir)}
        with subprocess.Popen([sys.executable, str(Path(__file__).with_name("publisher.py"))], env=environ) as first:
            deadline = time.monotonic() + 120
            while proxy.bytes_up < 0.6 * SIZE and first.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            first.send_signal(signal.SIGKILL)
        assert first.returncode == -signal.SIGKILL
        sent = proxy.bytes_up
        with CloudSync(server.cloud(bucket, **changes), paths.workdir) as cloud:
            side = cloud.run("tiny")
            lease = cloud.hold(side)
            lease.began(0)
            assert lease.epoch == 2
            assert side.publish(10) == 0  # bytes that were not begun
            again = proxy.bytes_up - sent
            assert again < 0.75 * SIZE
            # what was finished under the old epoch's key is nobody's now
            assert side.sweep() == 1
            view = side.catalogue.look()
            assert view.whole(10)
            assert sorted(view.objects) == [side.keys.file(10, 2, "model.safetensors")]
            copy = tmp_path / "copy"
            cloud.download_file(side.keys.file(10, 2, "model.safetensors"), copy)
            assert copy.read_bytes() == (paths.step(10) / "model.safetensors").read_bytes()
