"""The record follows the checkpoint, and survives what a kill leaves behind."""

import contextlib
import json
import logging
import resource

import pytest

from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.tracking.console import LogFile, logging_to_console
from wmtp_worker.tracking.heartbeat import Heartbeat
from wmtp_worker.tracking.metrics import MetricsLog, read


def test_resuming_cuts_back_to_where_the_checkpoint_saw_it(tmp_path):
    path = tmp_path / "logs" / "metrics.jsonl"
    with MetricsLog(path, 0) as metrics:
        metrics.write("train", 1, loss=0.1)
        metrics.sync()
        size = metrics.size
        metrics.write("train", 2, loss=0.2)
    with MetricsLog(path, size) as metrics:
        metrics.write("train", 2, loss=0.3)
    assert [(line["step"], line["loss"]) for line in read(path)] == [(1, 0.1), (2, 0.3)]


def test_floats_are_exact(tmp_path):
    value = 0.1 + 0.2
    with MetricsLog(tmp_path / "m.jsonl", 0) as metrics:
        metrics.write("train", 1, loss=value)
    assert read(tmp_path / "m.jsonl")[0]["loss"] == value


def test_a_torn_line_is_left_out(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "tr')
    assert [line["step"] for line in read(path)] == [1]
    assert read(tmp_path / "none.jsonl") == []


def test_a_lost_record_is_said(tmp_path, caplog):
    with MetricsLog(tmp_path / "m.jsonl", 100):
        pass
    assert "steps are missing from the record" in caplog.text


def test_what_a_full_disk_does_not_take_waits_for_room(tmp_path, caplog):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = tmp_path / "m.jsonl"
    with MetricsLog(path, 0) as metrics:
        metrics.write("train", 1, loss=0.1)
        size = metrics.size
        # what a full disk does too: the first part of the line is written, and nothing raised
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))
        try:
            metrics.write("train", 2, loss=0.2)
            metrics.write("train", 3, loss=0.3)
            assert metrics.size == size == path.stat().st_size
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert [line["step"] for line in read(path)] == [1]
        assert caplog.text.count("waits in memory") == 1
        metrics.write("train", 4, loss=0.4)
        assert metrics.size == path.stat().st_size
    assert [line["step"] for line in read(path)] == [1, 2, 3, 4]


def test_the_heartbeat_is_throttled_but_never_between_phases(tmp_path):
    path = tmp_path / "heartbeat.json"
    heartbeat = Heartbeat(path, "r")
    heartbeat.beat("train", step=1)
    heartbeat.beat("train", step=2)
    assert json.loads(path.read_text())["step"] == 1
    heartbeat.beat("save", step=3)
    assert json.loads(path.read_text()) | {"time": 0} == {"time": 0, "run": "r", "phase": "save", "step": 3}


def test_a_heartbeat_that_cannot_be_written_stops_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in ("gone", "file"):
        Heartbeat(tmp_path / folder / "heartbeat.json", "r").beat("train")


@pytest.mark.parametrize("terminal", [False, True])
def test_secrets_reach_neither_console_nor_file(terminal, tmp_path, monkeypatch):
    import io

    from rich.console import Console

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret-value")
    screen, path = io.StringIO(), RunPaths(tmp_path, "r").training_log
    with logging_to_console("info", Console(file=screen, force_terminal=terminal)), LogFile(path) as file:
        logging.getLogger("wmtp_worker.test").info("the key is %s", "planted-secret-value")
        file.open()
    for text in (screen.getvalue(), path.read_text()):
        assert "the key is" in text
        assert "planted-secret-value" not in text
    assert logging.getLogger("wmtp_worker").handlers == []


@pytest.mark.parametrize("opened", [False, True])
def test_the_log_has_what_came_before_it_could_be_opened(opened, tmp_path):
    import io

    from rich.console import Console

    path = RunPaths(tmp_path, "r").training_log
    with logging_to_console("info", Console(file=io.StringIO())), LogFile(path) as file:
        logging.getLogger("wmtp_worker.test").debug("early")
        assert not path.exists()
        if opened:
            file.open()
            assert "early" in path.read_text()
            logging.getLogger("wmtp_worker.test").debug("late")
            assert "late" in path.read_text()
    assert path.read_text().count("early") == 1


def test_a_terminal_that_hung_up_does_not_hide_why_a_run_ends():
    import os
    import pty

    from rich.console import Console

    from wmtp_worker.errors import Interrupted
    from wmtp_worker.tracking.console import StepBar

    leader, follower = pty.openpty()
    terminal = os.fdopen(follower, "w")
    bar = StepBar(Console(file=terminal, force_terminal=True), 10, 0)
    with pytest.raises(Interrupted), bar:  # noqa: PT012
        bar.update(1, "")
        os.close(leader)
        raise Interrupted("stopped by SIGHUP")
    with contextlib.suppress(OSError):  # what it still holds goes nowhere
        terminal.close()
