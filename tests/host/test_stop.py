"""Real signals to a real process."""

import signal
import subprocess
import sys
import threading

import pytest

from wmtp_worker.errors import Interrupted
from wmtp_worker.host.stop import SIGNALS, STOP, StopRequest

# says when it is ready, then works in steps of Python and of C until it is asked to stop
WORKER = """
import sys, time
from wmtp_worker.errors import WorkerError
from wmtp_worker.host.stop import STOP
STOP.install()
print("ready", flush=True)
try:
    for _ in range(400):
        time.sleep(0.05)
        if "deaf" not in sys.argv:
            STOP.check()
except WorkerError as error:
    print(error, STOP.reason, flush=True)
    sys.exit(error.exit_code)
"""


@pytest.fixture
def worker():
    started = []

    def start(*arguments):
        process = subprocess.Popen(
            [sys.executable, "-c", WORKER, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate(timeout=10)


@pytest.mark.parametrize("number", SIGNALS)
def test_one_signal_asks_and_ends_with_75(worker, number):
    process = worker()
    process.send_signal(number)
    out, err = process.communicate(timeout=10)
    assert process.returncode == 75
    assert out == f"stopped by {number.name} -> the same command goes on from what is saved {number.name}\n"
    assert err == f"wmtp: {number.name}: stopping at the next safe moment; a second signal stops at once\n"


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_a_second_signal_ends_at_once(worker, first, second):
    process = worker("deaf")
    process.send_signal(first)
    assert process.stderr.readline().startswith(f"wmtp: {first.name}")
    process.send_signal(second)
    assert process.wait(timeout=10) == 128 + second


def test_a_closed_stderr_does_not_matter(worker):
    process = worker()
    process.stderr.close()
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline().startswith("stopped by SIGTERM")
    assert process.wait(timeout=10) == 75


def test_a_request_without_a_signal():
    stop = StopRequest()
    stop.check()
    assert (stop.requested, stop.reason) == (False, None)
    stop.request("a notice")
    stop.request("another")
    assert (stop.requested, stop.reason) == (True, "a notice")
    with pytest.raises(Interrupted, match="stopped by a notice"):
        stop.check()


def test_a_request_is_seen_by_other_threads():
    stop = StopRequest()
    seen = threading.Event()

    def poll():
        while not stop.requested:
            seen.wait(0.01)
        seen.set()

    thread = threading.Thread(target=poll)
    thread.start()
    stop.request("a test")
    thread.join(timeout=10)
    assert seen.is_set()


def test_the_signals_are_given_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopRequest() as stop:
        stop.install()
        assert [signal.getsignal(number) for number in SIGNALS] == [stop._on_signal] * len(SIGNALS)
        signal.raise_signal(signal.SIGTERM)
        assert stop.reason == "SIGTERM"
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert not stop.requested


def test_importing_it_is_quick_and_brings_no_third_party():
    code = (
        "import sys; before = set(sys.modules); import wmtp_worker.host.stop;"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "wmtp_worker\n"


def test_there_is_one_for_the_process():
    assert isinstance(STOP, StopRequest)
    assert not STOP.requested


def test_nohup_keeps_its_meaning():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
