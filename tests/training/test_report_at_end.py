"""The page at the end of a run: made whatever ended it, and nobody waits for it."""

import threading
import time

import pytest

from tests.training.stopping import StopAfter
from wmtp_worker.errors import Interrupted
from wmtp_worker.host.stop import StopRequest
from wmtp_worker.storage.layout import RunPaths, RunRecord
from wmtp_worker.tracking import session
from wmtp_worker.training import report


@pytest.fixture
def paths(tmp_path):
    return RunPaths(tmp_path, "tiny")


def test_an_interrupted_run_has_one_before_its_sender_ends(tiny_run, tmp_path, paths, monkeypatch):
    there = []
    leave = session.Tracking.__exit__

    def leave_and_look(self, *error):
        there.append(paths.record.report.exists())
        leave(self, *error)

    monkeypatch.setattr(session.Tracking, "__exit__", leave_and_look)
    with pytest.raises(Interrupted, match=r"saved: .*step_1"):
        tiny_run(tmp_path, stop=StopAfter(4), report=True)
    assert "Interrupted at step 1 of 12 (test)" in paths.record.report.read_text()
    assert there == [True]


@pytest.mark.parametrize("seconds", [0.0, 4.0])
def test_a_process_that_must_end_makes_none(seconds, tmp_path):
    record = RunRecord(tmp_path)
    stop = StopRequest()
    stop.request("notice", deadline=time.monotonic() + seconds)
    report.write_in_time(record, stop)
    assert not record.report.exists()


def test_nobody_waits_for_a_page_that_takes_long(tmp_path, monkeypatch):
    go_on, stop = threading.Event(), StopRequest()
    monkeypatch.setattr(report, "write_report", lambda records, path: go_on.wait(60))
    monkeypatch.setattr(report, "_UNKNOWN", 0.2)
    began = time.monotonic()
    threading.Timer(0.3, stop.request, ["SIGINT"]).start()
    report.write_in_time(RunRecord(tmp_path), stop)
    go_on.set()
    assert 0.3 < time.monotonic() - began < 30


@pytest.mark.parametrize("error", [OSError("no space"), MemoryError(), RuntimeError("bug")])
def test_a_page_that_fails_changes_no_end(error, tiny_run, tmp_path, paths, monkeypatch):
    def fail(records, path):
        raise error

    monkeypatch.setattr(report, "write_report", fail)
    assert tiny_run(tmp_path, "training.max_steps=1", "training.warmup_steps=0", report=True).step == 1
    assert "no report: " in paths.training_log.read_text()
