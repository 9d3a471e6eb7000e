"""Real processes that hang, or only look as if they did."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from wmtp_worker.host.watchdog import Watchdog

# hangs in a function whose name is looked for in the stacks; "beating" beats all the while, until it is killed
WORKER = """
import logging, os, signal, sys, threading, time
from pathlib import Path
from wmtp_worker.host import watchdog as module
from wmtp_worker.host.watchdog import Watchdog

module._PART_SECONDS = 0.5

def stuck_in_a_collective():
    threading.Event().wait()

def loader_thread():
    threading.Event().wait()

threading.Thread(target=loader_thread, daemon=True).start()
with Watchdog(float(sys.argv[1]), log_file=Path(sys.argv[2], "training.log")) as watchdog:
    print("ready", flush=True)
    if "stops itself" in sys.argv:
        os.kill(os.getpid(), signal.SIGSTOP)
    while "beating" in sys.argv:
        watchdog.beat()
        time.sleep(0.05)
    stuck_in_a_collective()
"""


@pytest.fixture
def worker(tmp_path):
    started = []

    def start(seconds, *arguments, **options):
        process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(seconds), str(tmp_path), *arguments],
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options},
        )
        started.append(process)
        if process.stdout:
            assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait(timeout=10)
        for stream in (process.stdout, process.stderr):
            if stream:
                stream.close()


def test_a_hang_ends_with_75_and_all_stacks(worker, tmp_path):
    (tmp_path / "training.log").write_text("what was logged before\n")
    began = time.monotonic()
    process = worker(0.5)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 75
    assert time.monotonic() - began > 0.4
    assert err.startswith("wmtp: no progress for 0.5 s: ending with exit code 75; where every thread is:\n")
    log = (tmp_path / "training.log").read_text()
    assert log.startswith("what was logged before\nwmtp: no progress for 0.5 s")
    for text in (err, log):
        assert "stuck_in_a_collective" in text
        assert "loader_thread" in text


@pytest.mark.parametrize("where", ["stderr", "the log"])
def test_an_ending_that_hangs_ends_all_the_same(worker, tmp_path, where, monkeypatch):
    options = {}
    if where == "stderr":
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        try:  # nobody reads, and no room is left
            while True:
                os.write(writing, b"x" * 4096)
        except BlockingIOError:
            os.set_blocking(writing, True)
        options = {"stderr": writing}
    else:
        os.mkfifo(tmp_path / "training.log")  # opening it waits for a reader
    process = worker(0.3, **options)
    assert process.wait(timeout=180) == 75
    if where == "stderr":
        os.close(reading)
        os.close(writing)
        assert "stuck_in_a_collective" in (tmp_path / "training.log").read_text()


def test_beats_keep_it_quiet_and_a_stopped_process_gets_its_time(worker):
    process = worker(1.5, "beating")
    time.sleep(0.3)
    process.send_signal(signal.SIGSTOP)
    time.sleep(2.5)
    process.send_signal(signal.SIGCONT)
    time.sleep(1)
    assert process.poll() is None


def test_a_hang_after_a_wake_up_is_still_seen(worker):
    process = worker(1.5, "stops itself")
    time.sleep(2.5)
    woken = time.monotonic()
    process.send_signal(signal.SIGCONT)
    assert process.wait(timeout=180) == 75
    assert time.monotonic() - woken > 1.4


@pytest.fixture
def ended(monkeypatch):
    calls = threading.Event()
    monkeypatch.setattr(Watchdog, "_end", lambda self: calls.set())
    return calls


def watching():
    return [thread.name for thread in threading.enumerate() if thread.name == "watchdog"]


def test_zero_is_off(ended):
    with Watchdog(0) as watchdog:
        watchdog.beat()
        assert watching() == []
    watchdog.close()
    assert not ended.is_set()


def test_the_thread_is_joined():
    with Watchdog(1800):
        assert watching() == ["watchdog"]
        began = time.monotonic()
    assert watching() == []
    assert time.monotonic() - began < 4  # a tick is 5 s


def test_a_beat_is_cheap():
    watchdog = Watchdog(1800)
    began = time.process_time()
    for _ in range(10_000):
        watchdog.beat()
    assert time.process_time() - began < 1
