"""A worker that is stopped for longer than its lease, and wakes up: it publishes nothing more, says so, and ends."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.kills.processes import Worker
from wmtp_worker.settings import load
from wmtp_worker.storage import CloudSync
from wmtp_worker.storage.lease_file import read_lease

LIMIT = 120.0  # seconds for any one process
# never finished: not when the first one is stopped, nor when that wakes up
SETTINGS = ("training.max_steps=100000", "checkpoint.every=10", "evaluation.every=0", "checkpoint.lease_seconds=3")


def wait_for(line: str, output: Path, process: Worker) -> None:
    deadline = time.monotonic() + LIMIT
    while line not in output.read_text():
        assert process.running(), output.read_text()
        assert time.monotonic() < deadline, output.read_text()
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_paused_worker_cannot_publish(s3_server, tiny_settings, tmp_path, monkeypatch):
    variables = s3_server.variables(s3_server.make_bucket())
    workers = []

    def start(name: str) -> tuple[Worker, Path]:
        (tmp_path / name).mkdir()
        output = tmp_path / f"{name}.txt"
        worker = Worker(tmp_path / name, (*tiny_settings, *SETTINGS), output, variables, fork=True)
        workers.append(worker)
        return worker, output

    try:
        first, first_said = start("first")
        wait_for("is in the bucket", first_said, first)  # of several that wait, the newest
        os.kill(first.pid, signal.SIGSTOP)
        time.sleep(6)  # lease and slack
        second, second_said = start("second")
        wait_for("holding the run in the bucket: epoch 2", second_said, second)
        wait_for("is in the bucket", second_said, second)
        os.kill(first.pid, signal.SIGCONT)
        assert first.wait(LIMIT) == 79, first_said.read_text()
        assert "taken over by" in first_said.read_text()
        assert "epoch 1 may publish nothing more" in first_said.read_text()
        os.kill(second.pid, signal.SIGTERM)
        assert second.wait(LIMIT) == 75, second_said.read_text()
    finally:
        for worker in workers:
            worker.kill()

    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with CloudSync(load(preset="smoke", environ=variables).cloud, tmp_path / "onlooker") as cloud:
        side = cloud.run("tiny")
        view = side.catalogue.look()
        lease = read_lease(cloud.store, side.keys.lease).file
        began = dict(lease.epochs)
        assert lease.released
        assert max(view.steps) > began[2]
        for step, published in view.manifests.items():
            assert view.whole(step)
            assert side.catalogue.verify(step, published)
            assert published.epoch == (2 if step > began[2] else 1)
