"""Groups of tasks: they succeed or stop together, and leave nothing behind."""

import threading
import time

import pytest

from wmtp_worker.storage.transfer import pool as pools
from wmtp_worker.storage.transfer.pool import Group, Pool, Stopped


@pytest.fixture
def pool():
    made = Pool(4, "test-pool")
    yield made
    made.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("test-pool")]


def never():
    """Nobody stops."""


def test_leaving_waits_for_every_task(pool):
    done = []
    with Group(pool, never) as group:
        for number in range(200):
            group.submit(lambda number=number: done.append(number))
    assert sorted(done) == list(range(200))


def test_only_a_few_tasks_wait_at_once(pool):
    started, gate, submitted = [], threading.Event(), []

    def submit():
        with Group(pool, never) as group:
            for number in range(100):
                group.submit(lambda: (started.append(1), gate.wait(60)))
                submitted.append(number)

    thread = threading.Thread(target=submit)
    thread.start()
    deadline = time.monotonic() + 60
    while (len(started), len(submitted)) != (4, 16) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)  # and no more than those
    assert (len(started), len(submitted)) == (4, 16)
    gate.set()
    thread.join(60)
    assert len(submitted) == 100


def test_the_first_error_stops_the_rest_and_is_raised(pool):
    done = []

    def fail():
        raise OSError("broken")

    def run():
        with Group(pool, never) as group:
            group.submit(fail)
            for _ in range(1000):
                group.submit(lambda: (time.sleep(0.01), done.append(1)))

    with pytest.raises(OSError, match="broken"):
        run()
    assert len(done) < 500


def test_a_stop_reaches_tasks_that_wait(pool):
    asked = threading.Event()

    def check():
        if asked.is_set():
            raise InterruptedError("asked to")

    def work(group):
        asked.set()
        while True:
            time.sleep(0.01)
            group.heed()

    def run():
        with Group(pool, check) as group:
            for _ in range(4):
                group.submit(lambda: work(group))

    with pytest.raises(InterruptedError):
        run()


def test_a_task_that_hangs_does_not_hold_up_a_stop(pool, monkeypatch):
    monkeypatch.setattr(pools, "GRACE", 0.2)
    hangs, gate, last = threading.Event(), threading.Event(), []
    started = time.monotonic()

    def run():
        with Group(pool, never) as group:
            group.at_last(lambda: last.append("closed"))
            group.submit(lambda: (hangs.set(), gate.wait(60)))
            hangs.wait(60)
            raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        run()
    assert time.monotonic() - started < 30
    assert last == []  # it may still use what is to be closed
    gate.set()
    deadline = time.monotonic() + 60
    while not last and time.monotonic() < deadline:
        time.sleep(0.01)
    assert last == ["closed"]


def test_stopped_tells_the_first_reason():
    reason = ValueError()
    assert Stopped(Stopped(reason)).reason is reason


def test_more_threads_come_only_with_distance():
    def threads(seconds):
        pool = Pool(64, "test-distance", first=4)
        with Group(pool, never) as group:
            for _ in range(400):
                group.submit(lambda: time.sleep(seconds))
        count = len(pool._threads)
        pool.close()
        return count

    assert threads(0.001) < 16
    assert threads(0.05) >= 40
