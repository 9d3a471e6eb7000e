"""The queue behind the training: bounded, never raising, honest at the end."""

import threading
import time

import pytest

from wmtp_worker.errors import ExhaustedError
from wmtp_worker.storage.background import Background


@pytest.fixture
def queue():
    background = Background(retry_seconds=0.05)
    yield background
    background.close(60)
    assert not background._thread.is_alive()


def fail():
    raise ExhaustedError("the bucket is away")


def wait_for(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def test_jobs_run_in_order_and_nothing_is_left(queue):
    seen = []
    for number in range(3):
        queue.submit(f"slot{number}", str(number), lambda number=number: seen.append(number))
    assert queue.close(60) == {}
    assert seen == [0, 1, 2]


def test_the_newest_of_a_slot_replaces_the_one_that_waits(queue):
    gate, seen = threading.Event(), []
    queue.submit("checkpoint", "step_1", lambda: (gate.wait(60), seen.append(1)))
    wait_for(lambda: queue.pending == {"step_1": "not finished"})
    for step in (2, 3, 4):
        queue.submit("checkpoint", f"step_{step}", lambda step=step: seen.append(step))
    assert queue.pending == {"step_1": "not finished", "step_4": "still waiting"}
    gate.set()
    assert queue.close(60) == {}
    assert seen == [1, 4]


def test_what_is_not_uploaded_any_more_is_named(caplog):
    queue = Background(retry_seconds=60)
    with caplog.at_level("INFO", "wmtp_worker"):
        queue.submit("checkpoint", "step_1", fail)
        wait_for(lambda: queue.pending == {"step_1": "the bucket is away"})
        queue.submit("checkpoint", "step_2", lambda: None)
        assert queue.close(60) == {}
    assert "step_1 is not uploaded any more: step_2 takes its place" in caplog.text


def test_it_says_what_it_waits_for(queue, caplog):
    gate = threading.Event()
    queue.submit("pruning", "pruning of the bucket", lambda: gate.wait(60), optional=True)
    with caplog.at_level("INFO", "wmtp_worker"):
        queue.close(60, gate.set)
    assert "waiting up to 60 s for pruning of the bucket" in caplog.text


def test_what_fails_is_tried_again_by_itself(queue):
    attempts = []

    def work():
        attempts.append(time.monotonic())
        if len(attempts) < 3:
            raise ExhaustedError("the bucket is away")

    queue.submit("logs", "logs", work)
    wait_for(lambda: len(attempts) == 3 and not queue.pending)


def test_what_fails_is_not_safe_and_its_reason_is_told(queue):
    def fails():
        raise ExhaustedError("the bucket is away", where="put s3://b/k")

    queue.submit("a", "step_1", fails)
    queue.submit("b", "final.pt", lambda: None)
    wait_for(lambda: "step_1" in queue.pending and "final.pt" not in queue.pending)
    assert queue.close(60) == {"step_1": "the bucket is away (from put s3://b/k)"}


def test_a_bug_in_a_job_does_not_end_the_thread(queue, caplog):
    seen = []
    queue.submit("a", "bad", lambda: 1 / 0)
    queue.submit("b", "good", lambda: seen.append(1))
    wait_for(lambda: seen == [1])
    assert "ZeroDivisionError" in queue.close(60)["bad"]


def test_closing_ends_at_the_deadline_and_says_what_is_not_safe(queue):
    def slow():
        while True:  # as a transfer does it: a little work, then a look whether to go on
            time.sleep(0.01)
            queue.check()

    queue.submit("checkpoint", "step_1", slow)
    wait_for(lambda: queue.pending == {"step_1": "not finished"})
    queue.submit("logs", "logs", lambda: None)
    started, ticks = time.monotonic(), []
    not_safe = queue.close(0.3, lambda: ticks.append(1))
    assert 0.3 <= time.monotonic() - started < 30
    assert not_safe == {"logs": "still waiting", "step_1": "the time to finish the uploads is over"}
    assert ticks


def test_what_fails_while_closing_is_tried_once_more(queue):
    gate, attempts = threading.Event(), []

    def work():
        gate.wait(60)
        attempts.append(1)
        if len(attempts) == 1:
            raise ExhaustedError("the bucket is away")

    queue.submit("checkpoint", "step_1", work)
    wait_for(lambda: queue.pending == {"step_1": "not finished"})
    threading.Timer(0.1, gate.set).start()
    assert queue.close(60) == {}
    assert len(attempts) == 2


def test_an_optional_job_is_never_missed(queue, caplog):
    def fails():
        raise ExhaustedError("not allowed to delete")

    queue.submit("pruning", "pruning", fails, optional=True)
    assert queue.close(60) == {}
    assert "pruning failed: not allowed to delete" in caplog.text


def test_what_the_tick_raises_ends_the_waiting(queue):
    def slow():
        while True:
            time.sleep(0.01)
            queue.check()

    def tick():
        raise InterruptedError("stopped")

    queue.submit("checkpoint", "step_1", slow)
    with pytest.raises(InterruptedError):
        queue.close(60, tick)
    assert not queue.stuck


def test_a_job_that_hangs_is_left_behind(monkeypatch):
    monkeypatch.setattr("wmtp_worker.storage.background._GRACE_SECONDS", 0.1)
    gate, background = threading.Event(), Background()
    background.submit("checkpoint", "step_1", lambda: gate.wait(60))
    wait_for(lambda: background.pending == {"step_1": "not finished"})
    assert background.close(0.1) == {"step_1": "not finished"}
    assert background.stuck
    gate.set()
    wait_for(lambda: not background.stuck)
