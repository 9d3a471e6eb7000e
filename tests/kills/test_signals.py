"""SIGTERM, Ctrl-C and a dropped session, sent to the real command."""

import os
import signal
import subprocess
import sys
import time

import pytest

from wmtp_worker.storage.layout import RunPaths

LIMIT = 120


@pytest.fixture
def command(tmp_path, tiny_settings):
    """Start `wmtp train` of a run that would last minutes."""
    processes = []

    def start() -> subprocess.Popen[str]:
        settings = [*tiny_settings, "training.max_steps=100000", "checkpoint.every=50000", "evaluation.every=0"]
        arguments = [part for setting in settings for part in ("--set", setting)]
        process = subprocess.Popen(
            [sys.executable, "-m", "wmtp_worker", "train", "--run-name", "tiny", *arguments],
            env={**os.environ, "WMTP_WORKDIR": str(tmp_path)},
            cwd=tmp_path,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def wait_for_steps(paths: RunPaths, count: int) -> None:
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        if paths.metrics.exists() and paths.metrics.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.05)
    raise AssertionError(f"no {count} steps within {LIMIT} s")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_while_training_saves(number, command, tmp_path):
    paths = RunPaths(tmp_path, "tiny")
    process = command()
    wait_for_steps(paths, 3)
    process.send_signal(number)
    output, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 75, output
    (checkpoint,) = paths.checkpoints.glob("step_*")
    assert f"saved: {checkpoint}" in output
    assert "Traceback" not in output
    assert paths.metrics.read_bytes().count(b"\n") == int(checkpoint.name.removeprefix("step_"))


@pytest.mark.parametrize("delay", [0.4, 2.5])
def test_a_signal_while_modules_load(delay, command, tmp_path):
    process = command()
    time.sleep(delay)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 75, output
    assert "Traceback" not in output


def test_a_second_signal_ends_at_once(command, tmp_path):
    process = command()
    wait_for_steps(RunPaths(tmp_path, "tiny"), 3)
    process.send_signal(signal.SIGSTOP)  # both arrive before it can act on the first
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    process.communicate(timeout=LIMIT)
    assert process.returncode in (128 + signal.SIGTERM, 128 + signal.SIGINT)
