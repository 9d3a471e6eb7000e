"""How long the end of a run waits for a server."""

import socket
import threading
import time

import pytest

from tests.tracking.test_server import step, working
from wmtp_worker.host.stop import StopRequest
from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.tracking import session
from wmtp_worker.tracking.record import TrackedRun


@pytest.mark.parametrize("left", [None, 1.0])
@pytest.mark.parametrize("after", [0.0, 0.5])
def test_a_finished_run_that_shall_end_does_not_wait_for_its_server(after, left, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(session, "_STOP_SECONDS", 1.0)
    paths, stop = RunPaths(tmp_path, "run"), StopRequest()

    def ask():
        stop.request("SIGTERM", None if left is None else time.monotonic() + left)

    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and answers nobody
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with working(paths, uri, close_seconds=600, stop=stop) as metrics:
            step(metrics, 1)
            asking = threading.Timer(after, ask)
            ask() if not after else asking.start()
            began = time.monotonic()
        assert time.monotonic() - began < 60
    assert TrackedRun.load(paths.tracking_record).status == "FINISHED"
    assert "wmtp tracking push run" in caplog.text
