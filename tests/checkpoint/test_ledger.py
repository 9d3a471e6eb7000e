"""The ledger of a run: its lines survive whatever happens to the file."""

import json
import logging
import os
import resource
import subprocess
import sys
import threading
import time

import pytest

from wmtp_worker.checkpoint.ledger import End, Ledger, Phases, Running, Save, Start, read_heartbeat, read_ledger


@pytest.fixture
def begin(tmp_path):
    """A process of the run begins; its ledger."""

    def start(**given):
        return Ledger.begin(tmp_path / "ledger.jsonl", tmp_path / "metrics.jsonl", Phases(), **{"gpus": 1} | given)

    return start


def write_metrics(path, steps, seconds=2.0, torn=b""):
    records = [{"kind": "train", "step": step, "loss": 1.0, "seconds": seconds} for step in steps]
    records.append({"kind": "validation", "step": steps[-1], "loss": 9.0})
    path.write_bytes(b"".join(json.dumps(record).encode() + b"\n" for record in records) + torn)


def test_a_process_writes_its_lines_and_they_are_read_back(begin, tmp_path):
    ledger = begin(gpus=8, price_per_hour=24.0)
    ledger.running(None)
    ledger.save(100, pause=0.5, cost=0.7, carry=12.0, seconds_per_step=1.5)
    ledger.end("finished", 120, detail="all steps")
    read = read_ledger(tmp_path / "ledger.jsonl")
    assert read == ledger.events
    assert [type(event) for event in read] == [Start, Running, Save, End]
    start = read[0]
    assert (start.gpus, start.price_per_hour, start.resume, start.pid) == (8, 24.0, "auto", os.getpid())
    assert start.reached.step == 0
    assert len({event.process for event in read}) == 1


def test_each_line_is_one_write(begin, tmp_path, monkeypatch):
    writes = []
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: writes.append(data) or real(descriptor, data))
    begin().save(1, pause=0.0)
    assert [line.count(b"\n") for line in writes] == [1, 1]
    assert b"".join(writes) == (tmp_path / "ledger.jsonl").read_bytes()


def test_writers_do_not_tear_each_others_lines(begin, tmp_path):
    def save(step):
        ledger = begin()
        for _ in range(50):
            ledger.save(step, pause=0.0)

    threads = [threading.Thread(target=save, args=(step,)) for step in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # a writer that sees another's line half there begins a new one: empty lines are none
    lines = [line for line in (tmp_path / "ledger.jsonl").read_bytes().splitlines() if line]
    assert len(lines) == len(read_ledger(tmp_path / "ledger.jsonl")) == 4 * 51


def test_only_the_first_end_counts(begin, tmp_path):
    ledger = begin()
    ledger.end("finished", 12)
    ledger.end("failed", 12, detail="not all of it is in the bucket")
    assert [event.how for event in read_ledger(tmp_path / "ledger.jsonl")[1:]] == ["finished"]


@pytest.mark.parametrize("keep", [1, 20, 60])
def test_a_torn_last_line_is_left_out_and_spoils_no_other(begin, tmp_path, keep):
    first = begin()
    first.save(7, pause=0.0)
    path = tmp_path / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:keep])
    assert len(read_ledger(path)) == 1
    begin().end("notice", 9)
    assert [type(event) for event in read_ledger(path)] == [Start, Start, End]


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe\x00",
        b"null",
        b"[]",
        b'{"event": "start"}',
        b'{"event": "save", "process": "a", "time": 1, "step": -1, "pause": 0}',
        b'{"event": "save", "process": "a", "time": NaN, "step": 1, "pause": 0}',
        b'{"event": "end", "process": "a", "time": 1e300, "step": 1, "how": "notice"}',
        b'{"event": "save", "process": "a", "time": 1, "step": 1' + b"0" * 400 + b', "pause": 0}',
        b'{"event": "something new", "process": "a", "time": 1}',
        b"[" * 100_000,
    ],
)
def test_lines_that_make_no_sense_are_left_out(begin, tmp_path, line):
    begin()
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(line + b"\n" + path.read_bytes() + line)
    assert [type(event) for event in read_ledger(path)] == [Start]


def test_what_a_newer_worker_adds_does_not_hide_a_line(begin, tmp_path):
    begin()
    path = tmp_path / "ledger.jsonl"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"colour": "blue"}) + "\n")
    assert len(read_ledger(path)) == 1


def test_a_ledger_that_cannot_be_written_warns_once(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    ledger = Ledger.begin(tmp_path / "file" / "ledger.jsonl", tmp_path / "metrics.jsonl", Phases(), gpus=1)
    ledger.save(1, pause=0.0)
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "ledger of lost work cannot be written" in warnings[0]
    assert len(ledger.events) == 2  # the account of this process is whole all the same


# --- how far the process before had come -------------------------------------------------------------------------


def test_a_line_that_does_not_fit_is_left_out_whole(begin, tmp_path, caplog):
    ledger = begin()
    path = tmp_path / "ledger.jsonl"
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))  # as a disk with ten bytes left
    try:
        ledger.save(1, pause=0.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert "the ledger of lost work cannot be written" in caplog.text


def test_the_last_step_is_found_in_the_metrics(begin, tmp_path):
    write_metrics(tmp_path / "metrics.jsonl", range(1, 300), seconds=2.0, torn=b'{"kind": "train", "step": 300, "lo')
    reached = begin().events[0].reached
    assert (reached.step, reached.seconds_per_step, reached.time) == (299, 2.0, None)


def test_of_long_metrics_only_the_end_is_read(begin, tmp_path):
    write_metrics(tmp_path / "metrics.jsonl", range(1, 20_000))
    assert begin().events[0].reached.step == 19_999


def test_after_a_wiped_disk_the_heartbeat_of_the_bucket_knows_more(begin, tmp_path):
    write_metrics(tmp_path / "metrics.jsonl", range(1, 101))
    remote = {"time": time.time(), "step": 137, "phase": "train"}
    reached = begin(heartbeats=[None, remote]).events[0].reached
    assert (reached.step, reached.time) == (137, remote["time"])


def test_a_heartbeat_from_before_the_last_start_is_of_another_process(begin):
    stale = {"time": time.time() - 60, "step": 437}
    begin(heartbeats=[stale])
    assert begin(heartbeats=[stale]).events[-1].reached.step == 0


def test_a_heartbeat_without_a_step_still_tells_the_time(begin):
    beat = {"time": time.time(), "phase": "model"}
    assert begin(heartbeats=[beat]).events[0].reached.time == beat["time"]


@pytest.mark.parametrize(
    "beat",
    [{}, {"time": "x", "step": 5}, {"time": 1e300, "step": 5}, {"time": float("nan"), "step": 5}, {"step": True}],
)
def test_heartbeats_that_make_no_sense_count_for_nothing(begin, beat):
    assert begin(heartbeats=[beat]).events[0].reached.step == 0


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_heartbeat_file_that_makes_no_sense(tmp_path, content):
    (tmp_path / "heartbeat.json").write_bytes(content)
    assert read_heartbeat(tmp_path / "heartbeat.json") is None
    assert read_heartbeat(tmp_path / "absent.json") is None


@pytest.mark.parametrize(
    "record", ["7", '{"kind": "train", "step": "x"}', '{"kind": "train", "step": 3, "seconds": NaN}']
)
def test_metrics_that_make_no_sense(begin, tmp_path, record):
    (tmp_path / "metrics.jsonl").write_text(record + "\n")
    assert begin().events[0].reached.seconds_per_step is None


# --- phases ------------------------------------------------------------------------------------------------------


def test_phases_follow_each_other_without_a_gap():
    began = time.perf_counter()
    phases = Phases()
    phases.done("boot")
    for name in ("fetch", "setup", "fetch"):
        time.sleep(0.01)
        phases.done(name)
    took = time.perf_counter() - began
    assert list(phases.seconds) == ["boot", "fetch", "setup"]
    assert phases.seconds["fetch"] >= 0.02
    assert sum(phases.seconds.values()) - phases.seconds["boot"] <= took


def test_the_first_phase_began_with_the_process():
    code = (
        "import time; time.sleep(0.3); from wmtp_worker.checkpoint.ledger import Phases;"
        "phases = Phases(); phases.done('boot'); print(phases.seconds['boot'])"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180, check=True)
    assert 0.3 <= float(done.stdout) <= time.perf_counter() - began + 0.05
