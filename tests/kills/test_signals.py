"""SIGTERM, Ctrl-C and a dropped session, sent to the real command."""

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.kills.processes import Worker
from wmtp_worker.storage.layout import RunPaths

LIMIT = 120.0


@pytest.fixture
def command(tmp_path, tiny_settings):
    """`command(fork=…)`: start `wmtp train` of a run that would last minutes."""
    workers = []

    def start(*, fork: bool) -> Worker:
        settings = (*tiny_settings, "training.max_steps=100000", "checkpoint.every=50000", "evaluation.every=0")
        workers.append(Worker(tmp_path, settings, tmp_path / "output.txt", {}, fork=fork))
        return workers[-1]

    yield start
    for worker in workers:
        worker.kill()


def said(tmp_path) -> str:
    return (tmp_path / "output.txt").read_text()


def wait_for_steps(paths: RunPaths, count: int) -> None:
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        if paths.metrics.exists() and paths.metrics.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.05)
    raise AssertionError(f"no {count} steps within {LIMIT} s")


@pytest.mark.parametrize(
    ("number", "fork"), [(signal.SIGTERM, False), (signal.SIGINT, True), (signal.SIGHUP, True)], ids=str
)
def test_a_signal_while_training_saves(number, fork, command, tmp_path):
    paths = RunPaths(tmp_path, "tiny")
    process = command(fork=fork)
    wait_for_steps(paths, 3)
    os.kill(process.pid, number)
    assert process.wait(LIMIT) == 75, said(tmp_path)
    (checkpoint,) = paths.checkpoints.glob("step_*")
    assert f"saved: {checkpoint}" in said(tmp_path)
    assert "Traceback" not in said(tmp_path)
    assert paths.metrics.read_bytes().count(b"\n") == int(checkpoint.name.removeprefix("step_"))


def wait_until_heeded(pid: int, number: int) -> None:
    """Until the process has a handler for that signal: before, it ends any Python."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        caught = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        if caught and int(caught[1], 16) >> (number - 1) & 1:
            return
        time.sleep(0.005)
    raise AssertionError(f"no handler of {number} within {LIMIT} s")


@pytest.mark.skipif(sys.platform != "linux", reason="looks for the handler in /proc")
@pytest.mark.parametrize("delay", [0, 2.0])
def test_a_signal_while_modules_load(delay, command, tmp_path):
    process = command(fork=False)
    wait_until_heeded(process.pid, signal.SIGTERM)
    time.sleep(delay)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(LIMIT) == 75, said(tmp_path)
    assert "Traceback" not in said(tmp_path)


def test_a_second_signal_ends_at_once(command, tmp_path):
    process = command(fork=True)
    wait_for_steps(RunPaths(tmp_path, "tiny"), 3)
    os.kill(process.pid, signal.SIGSTOP)  # both arrive before it can act on the first
    os.kill(process.pid, signal.SIGTERM)
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGCONT)
    assert process.wait(LIMIT) in (128 + signal.SIGTERM, 128 + signal.SIGINT)
