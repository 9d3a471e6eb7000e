"""Work beside the training: at a low priority, at a slow pace, and its waiting known."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from wmtp_worker.checkpoint import lowly
from wmtp_worker.checkpoint.lowly import Pace, step_back, waiting

linux = pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads")


def in_a_thread(work):
    found = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


@linux
def test_a_thread_steps_back_alone():
    def step_back_and_look():
        step_back()
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = os.getpriority(os.PRIO_PROCESS, 0)
    assert in_a_thread(step_back_and_look) == max(15, before)
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


def test_work_rests_in_proportion(monkeypatch):
    cpu, wall, rests = [0.0], [0.0], []
    monkeypatch.setattr(lowly, "cpu_limit", lambda: 4.0)  # 3 % of four: 12 % of one
    monkeypatch.setattr(time, "thread_time", lambda: cpu[0])
    monkeypatch.setattr(time, "perf_counter", lambda: wall[0])

    def rest(seconds):
        rests.append(seconds)
        wall[0] += seconds

    pace = Pace(rest)
    for working, waiting_for_the_disk in ((0.12, 0.0), (0.06, 0.14), (0.012, 1.0)):
        cpu[0] += working
        wall[0] += working + waiting_for_the_disk
        pace.keep()
    assert rests == pytest.approx([1 - 0.12, 0.5 - 0.2])
    assert pace.rested == pytest.approx(1.18)


@linux
def test_waiting_for_a_processor_is_noticed():
    if not Path("/proc/thread-self/schedstat").exists():
        pytest.skip("this kernel does not tell")
    cpu = min(os.sched_getaffinity(0))
    rival = subprocess.Popen([sys.executable, "-c", f"import os; os.sched_setaffinity(0, [{cpu}])\nwhile True: pass"])

    def spin():
        os.sched_setaffinity(0, {cpu})
        started, end = waiting(), time.perf_counter() + 60
        while time.perf_counter() < end and waiting() - started < 0.05:
            sum(range(1000))
        return waiting() - started

    try:
        assert in_a_thread(spin) >= 0.05
    finally:
        rival.kill()
        rival.wait()
