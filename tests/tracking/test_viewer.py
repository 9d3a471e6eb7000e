"""`wmtp tracking open` where its server cannot be had; with one, tests/tracking/test_training.py."""

import socket

import pytest

from wmtp_worker.cli import main
from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.tracking.record import TrackedRun


@pytest.fixture
def open_(tmp_path, monkeypatch):
    TrackedRun(run="run", experiment="tests", settings_digest="d").write(RunPaths(tmp_path, "run").tracking_record)
    monkeypatch.setenv("WMTP_WORKDIR", str(tmp_path))
    return lambda port: main(["tracking", "open", "--once", "--mlflow", "false", "--port", str(port)])


def test_a_server_that_does_not_start_is_one_clear_error(open_, capsys):
    assert open_(0) == 75
    said = capsys.readouterr().err
    assert "MLflow's server does not start: without a word" in said
    assert "Traceback" not in said


def test_the_port_of_another_server_is_not_ours(open_, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert open_(other.getsockname()[1]) == 78
    assert "--port 0" in capsys.readouterr().err
