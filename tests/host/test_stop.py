"""Real signals to a real process."""

import signal
import subprocess
import sys
import threading
import time

import pytest

from wmtp_worker.errors import Interrupted
from wmtp_worker.host.stop import GRACE, SIGNALS, STOP, StopRequest

# says when it is ready, then works in steps of Python and of C until it is asked to stop
WORKER = """
import sys, time
from wmtp_worker.errors import WorkerError
from wmtp_worker.host.stop import STOP
STOP.install()
if "noticed" in sys.argv:
    STOP.request("a notice", time.monotonic() + 100, machine_goes=True)
print("ready", flush=True)
try:
    for _ in range(2000):
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
        process.communicate(timeout=180)


@pytest.mark.parametrize("number", SIGNALS)
def test_one_signal_asks_and_ends_with_75(worker, number):
    process = worker()
    process.send_signal(number)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 75
    assert out == f"stopped by {number.name} -> the same command goes on from what is saved {number.name}\n"
    assert err == f"wmtp: {number.name}: stopping at the next safe moment; a second signal stops at once\n"


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", [number for number in SIGNALS if number != signal.SIGHUP])
def test_a_second_signal_ends_at_once(worker, first, second):
    process = worker("deaf")
    process.send_signal(first)
    assert process.stderr.readline().startswith(f"wmtp: {first.name}")
    process.send_signal(second)
    assert process.wait(timeout=180) == 128 + second


def test_a_terminal_that_hangs_up_says_so_more_than_once(worker):
    process = worker("deaf")
    for _ in range(2):
        process.send_signal(signal.SIGHUP)
        time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=180) == 128 + signal.SIGTERM


def test_the_first_signal_after_a_notice_does_not_cut_off_the_save(worker):
    # a machine that is shut down after its notice sends SIGTERM to all that runs on it
    process = worker("noticed", "deaf")
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline().startswith("wmtp: SIGTERM: stopping")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=180) == 128 + signal.SIGTERM


def test_a_closed_stderr_does_not_matter(worker):
    process = worker()
    process.stderr.close()
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline().startswith("stopped by SIGTERM")
    assert process.wait(timeout=180) == 75


def test_a_request_without_a_signal():
    stop = StopRequest()
    stop.check()
    assert (stop.requested, stop.reason) == (False, None)
    stop.request("a notice")
    stop.request("another")
    assert (stop.requested, stop.reason) == (True, "a notice")
    with pytest.raises(Interrupted, match="stopped by a notice"):
        stop.check()


def test_the_first_reason_and_the_earliest_deadline_are_kept():
    stop = StopRequest()
    assert (stop.deadline, stop.seconds_left, stop.machine_goes) == (None, None, False)
    now = time.monotonic()
    stop.request("first")
    assert stop.seconds_left is None
    stop.request("second", now + 120, machine_goes=True)
    stop.request("third", now + 30)
    stop.request("fourth", now + 60)
    assert (stop.reason, stop.deadline, stop.machine_goes) == ("first", now + 30, True)
    assert 5 < stop.seconds_left <= 30
    stop.request("fifth", now - 5)
    assert stop.seconds_left == 0


def test_a_warning_asks_for_one_save_and_no_stop():
    stop = StopRequest()
    assert (stop.save_soon, stop.take_save()) == (False, None)
    stop.warn("rebalance")
    stop.warn("maintenance")
    assert (stop.save_soon, stop.requested) == (True, False)
    assert stop.take_save() == "rebalance"
    assert (stop.save_soon, stop.take_save()) == (False, None)


@pytest.mark.parametrize(
    ("grace", "number", "seconds"),
    [
        ("30", signal.SIGTERM, 30),
        ("0.5", signal.SIGTERM, 0.5),
        ("30", signal.SIGINT, None),
        ("30", signal.SIGHUP, None),
        ("", signal.SIGTERM, None),
        ("soon", signal.SIGTERM, None),
        ("-1", signal.SIGTERM, None),
        ("nan", signal.SIGTERM, None),
        (None, signal.SIGTERM, None),
    ],
)
def test_the_grace_after_sigterm_is_what_the_host_gives(monkeypatch, grace, number, seconds):
    monkeypatch.delenv(GRACE, raising=False)
    if grace is not None:
        monkeypatch.setenv(GRACE, grace)
    with StopRequest() as stop:
        before = time.monotonic()
        signal.raise_signal(number)
        assert stop.requested
        assert not stop.machine_goes
        if seconds is None:
            assert stop.deadline is None
        else:
            assert before + seconds <= stop.deadline <= time.monotonic() + seconds


def test_everything_is_forgotten_with_the_signals():
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        stop.request("a notice", 0.0, machine_goes=True)
        stop.warn("rebalance")
    assert (stop.requested, stop.deadline, stop.machine_goes, stop.save_soon) == (False, None, False, False)
    with stop:
        signal.raise_signal(signal.SIGTERM)  # the first again, not the second
        assert stop.reason == "SIGTERM"


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
    thread.join(timeout=180)
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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180, check=True)
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
