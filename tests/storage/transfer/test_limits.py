"""Bounds on memory and bandwidth."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from wmtp_worker.storage.transfer.limits import Bandwidth, MemoryBudget


def never():
    """Nobody stops."""


def test_no_more_is_held_than_the_budget_and_all_get_their_turn():
    budget, lock, held, most = MemoryBudget(100), threading.Lock(), [0], [0]

    def work(size):
        with budget.hold(size, never):
            with lock:
                held[0] += size
                most[0] = max(most[0], held[0])
            time.sleep(0.002)
            with lock:
                held[0] -= size

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, [1, 99, 60, 60, 3, 40] * 10))
    assert held == [0]
    assert 60 <= most[0] <= 100


def test_one_piece_larger_than_the_budget_goes_alone():
    budget = MemoryBudget(10)
    with budget.hold(50, never):
        waiting = threading.Thread(target=lambda: budget.hold(1, never).__enter__())
        waiting.start()
        waiting.join(0.05)
        assert waiting.is_alive()
    waiting.join(60)
    assert not waiting.is_alive()


def test_small_pieces_do_not_starve_a_large_one():
    budget, order = MemoryBudget(10), []

    def take(size):
        with budget.hold(size, never):
            order.append(size)

    with budget.hold(5, never):
        threads = [threading.Thread(target=take, args=(size,)) for size in (10, 1)]
        for waiting, thread in enumerate(threads, start=1):
            thread.start()
            deadline = time.monotonic() + 60
            while len(budget._waiting) < waiting and time.monotonic() < deadline:
                time.sleep(0.005)
        assert order == []
    for thread in threads:
        thread.join(60)
    assert order == [10, 1]


def test_waiting_heeds_a_stop():
    def stop():
        raise InterruptedError

    budget, bandwidth = MemoryBudget(10), Bandwidth(1)
    with budget.hold(10, never), pytest.raises(InterruptedError):
        budget.hold(1, stop).__enter__()
    with pytest.raises(InterruptedError):
        bandwidth.take(1000, stop)
    with budget.hold(10, stop):
        pass  # nothing stayed held


def test_bandwidth_is_kept_by_many_threads_together():
    bandwidth = Bandwidth(1_000_000)
    started = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: bandwidth.take(10_000, never), range(50)))
    seconds = time.monotonic() - started
    assert 0.45 < seconds < 3.5  # were each to wait alone, it would be 4


def test_no_cap_does_not_wait():
    started = time.monotonic()
    Bandwidth(0).take(1 << 40, never)
    assert time.monotonic() - started < 10
