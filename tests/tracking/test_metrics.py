"""The record follows the checkpoint, and survives what a kill leaves behind."""

import contextlib
import errno
import io
import json
import logging
import os
import pty
import resource
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from rich.console import Console

from wmtp_worker.errors import DiskFullError, Interrupted
from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.tracking import heartbeat as heartbeat_module
from wmtp_worker.tracking.console import LogFile, StepBar, logging_to_console
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
        assert size == path.stat().st_size
        # what a full disk does too: the first part of the line is written, and nothing raised
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))
        try:
            metrics.write("train", 2, loss=0.2)
            metrics.write("train", 3, loss=0.3)
            assert path.stat().st_size == size
            promised = metrics.size  # what a checkpoint taken now stands for
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert [line["step"] for line in read(path)] == [1]
        assert caplog.text.count("waits in memory") == 1
        metrics.write("train", 4, loss=0.4)
        assert metrics.size == path.stat().st_size
    assert [line["step"] for line in read(path)] == [1, 2, 3, 4]
    with MetricsLog(path, promised):
        assert [line["step"] for line in read(path)] == [1, 2, 3]


def test_a_quota_that_shows_only_in_fsync_is_a_full_disk(tmp_path, monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with MetricsLog(tmp_path / "m.jsonl", 0) as metrics:
        metrics.write("train", 1, loss=0.1)
        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(DiskFullError):
            metrics.sync()


def test_a_full_disk_is_said_once_by_the_log_and_ends_nothing(tmp_path, capsys):
    screen, path = io.StringIO(), RunPaths(tmp_path, "r").training_log
    path.parent.mkdir(parents=True)
    path.symlink_to("/dev/full")
    log = logging.getLogger("wmtp_worker.test")
    with logging_to_console("info", Console(file=screen)), LogFile(path) as file:
        file.open()
        for number in range(3):
            log.info("line %d %s", number, "x" * 10_000)
    assert screen.getvalue().count(f"{path} lacks lines from here on: No space left") == 1
    assert screen.getvalue().count("line ") == 3
    assert capsys.readouterr().err == ""


def test_the_heartbeat_is_throttled_but_never_between_phases(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat_module, "_INTERVAL", 60.0)
    path = tmp_path / "heartbeat.json"
    heartbeat = Heartbeat(path, "r")
    heartbeat.beat("train", step=1)
    heartbeat.beat("train", step=2)
    assert json.loads(path.read_text())["step"] == 1
    heartbeat.beat("save", step=3)
    assert json.loads(path.read_text()) | {"time": 0} == {"time": 0, "run": "r", "phase": "save", "step": 3}


def test_the_heartbeat_goes_on_during_a_call_that_cannot_beat(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat_module, "_INTERVAL", 0.01)
    monkeypatch.setattr(heartbeat_module, "_LONGEST_CALL", 5.0)
    beats = []
    heartbeat = Heartbeat(tmp_path / "heartbeat.json", "r", lambda: beats.append(time.monotonic()))
    with heartbeat.during("model"):
        began = time.monotonic()
        while len(beats) < 5:
            assert time.monotonic() < began + 60
            time.sleep(0.01)
        assert json.loads((tmp_path / "heartbeat.json").read_text())["phase"] == "model"
        while time.monotonic() - beats[-1] < 0.5:  # a call that never comes back is seen in the end
            assert time.monotonic() < began + 60
            time.sleep(0.01)
    after = len(beats)
    time.sleep(0.05)
    assert len(beats) == after


def test_beats_of_several_threads_leave_one_whole_file(tmp_path):
    path = tmp_path / "heartbeat.json"
    heartbeat = Heartbeat(path, "r")
    heartbeat.beat("begin")

    def beat(name):
        for number in range(300):
            heartbeat.beat(f"{name}{number}", filling="x" * 5000)
            assert json.loads(path.read_text())["run"] == "r"

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(beat, "abc"))


def test_a_heartbeat_that_cannot_be_written_stops_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in ("gone", "file"):
        Heartbeat(tmp_path / folder / "heartbeat.json", "r").beat("train")


@pytest.mark.parametrize("terminal", [False, True])
def test_secrets_reach_neither_console_nor_file(terminal, tmp_path, monkeypatch):
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


# the bar's own thread may draw it between the hang-up and its end
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_terminal_that_hung_up_does_not_hide_why_a_run_ends():
    leader, follower = pty.openpty()
    terminal = os.fdopen(follower, "w")
    bar = StepBar(Console(file=terminal, force_terminal=True), 10, 0)
    with pytest.raises(Interrupted), bar:  # noqa: PT012
        bar.update(1, "")
        os.close(leader)
        raise Interrupted("stopped by SIGHUP")
    with contextlib.suppress(OSError):  # what it still holds goes nowhere
        terminal.close()
