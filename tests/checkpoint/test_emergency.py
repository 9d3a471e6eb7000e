"""What to save in the time that is left; every number is worked out by hand."""

import threading

import pytest

from wmtp_worker.checkpoint.emergency import Rates, choose

MB, GB = 1_000_000, 1_000_000_000
SEVEN_B = {"full_bytes": 84 * GB, "trainable_bytes": 28 * GB, "write_rate": 2e9, "upload_rate": 1e9}


def plan(seconds_left, **changes):
    """1 GB of state, 400 MB of it trained weights; 200 MB/s to the disk, 50 MB/s to the bucket.

    full:       written in  5 s, uploaded in 20 s: 2 + 1.5 * 25 = 39.5 s; written alone 2 + 1.5 * 5 = 9.5 s
    trainable:  written in  2 s, uploaded in  8 s: 2 + 1.5 * 10 = 17 s;   written alone 2 + 1.5 * 2 = 5 s
    """
    usual = {
        "step": 120,
        "saved_step": 100,
        "full_bytes": GB,
        "trainable_bytes": 400 * MB,
        "write_rate": 200e6,
        "upload_rate": 50e6,
        "uploads": True,
        "must_upload": True,
    }
    return choose(**{**usual, "seconds_left": seconds_left, **changes})


@pytest.mark.parametrize(
    ("seconds_left", "changes", "kind", "needed", "reaches"),
    [
        # the machine goes with its disk
        (120, {}, "full", 39.5, True),
        (39.5, {}, "full", 39.5, True),
        (39.4, {}, "trainable", 17, True),
        (17, {}, "trainable", 17, True),
        (16.9, {}, "full", 9.5, False),  # nothing gets to the bucket: on the disk, in case it stays
        (9.4, {}, "skip", 0, False),
        (0, {}, "skip", 0, False),
        # 500 MB are on their way already, 10 s: full 2 + 1.5 * 35 = 54.5, trainable 2 + 1.5 * 20 = 32
        (54.5, {"queued_bytes": 500 * MB}, "full", 54.5, True),
        (54.4, {"queued_bytes": 500 * MB}, "trainable", 32, True),
        (31.9, {"queued_bytes": 500 * MB}, "skip", 0, False),  # what is on its way is not slowed down
        # 400 MB of an earlier save are written first, 2 s: full 2 + 1.5 * 27 = 42.5, trainable 2 + 1.5 * 12 = 20
        (42.5, {"unwritten_bytes": 400 * MB}, "full", 42.5, True),
        (42.4, {"unwritten_bytes": 400 * MB}, "trainable", 20, True),
        (12.4, {"unwritten_bytes": 400 * MB, "must_upload": False}, "trainable", 8, False),  # full: 2 + 1.5 * 7
        # a signal: the disk stays, as far as anybody knows
        (39.5, {"must_upload": False}, "full", 9.5, True),
        (39.4, {"must_upload": False}, "full", 9.5, False),
        (9.5, {"must_upload": False}, "full", 9.5, False),
        (9.4, {"must_upload": False}, "trainable", 5, False),
        (4.9, {"must_upload": False}, "skip", 0, False),
        # no bucket: only the write counts, whoever asks
        (9.5, {"uploads": False}, "full", 9.5, False),
        (9.4, {"uploads": False}, "trainable", 5, False),
        (4.9, {"uploads": False}, "skip", 0, False),
        # nothing was measured: 100 MB/s and 10 MB/s: full 2 + 1.5 * 110 = 167, trainable 2 + 1.5 * 44 = 68
        (167, {"write_rate": None, "upload_rate": None}, "full", 167, True),
        (166, {"write_rate": None, "upload_rate": None}, "trainable", 68, True),
        (67, {"write_rate": None, "upload_rate": None}, "full", 17, False),
        # LoRA: 20 MB in all, 5 MB trained: 2 + 1.5 * 0.5 = 2.75
        (3, {"full_bytes": 20 * MB, "trainable_bytes": 5 * MB}, "full", 2.75, True),
        # 7B on one machine, 2 GB/s and 1 GB/s: 84 GB 2 + 1.5 * (42 + 84) = 191, its weights 2 + 1.5 * (14 + 28) = 65
        (191, SEVEN_B, "full", 191, True),
        (120, SEVEN_B, "trainable", 65, True),
        # no deadline is known
        (None, {}, "full", 39.5, True),
        (None, {"uploads": False}, "full", 9.5, False),
        # nothing new
        (120, {"saved_step": 120}, "skip", 0, True),
        (None, {"saved_step": 121}, "skip", 0, True),
        (120, {"saved_step": 120, "uploads": False}, "skip", 0, False),
    ],
)
def test_choose(seconds_left, changes, kind, needed, reaches):
    found = plan(seconds_left, **changes)
    assert (found.kind, found.reaches_bucket) == (kind, reaches)
    assert found.seconds_needed == pytest.approx(needed)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (plan(120), "full: written and uploaded in about 40 s of 120 s left"),
        (plan(30), "trainable: all of it would take 40 s, the trained weights alone about 17 s of 30 s left"),
        (plan(5), "skip: nothing can be written and uploaded in time: even the trained weights would take 17 s"),
        (
            plan(12),
            "full: nothing can be written and uploaded in time: even the trained weights would take 17 s of 12 s "
            "left; written in about 10 s, in case the disk stays",
        ),
        (plan(20, must_upload=False), "full: written in about 10 s of 20 s left, the upload may not end in time"),
        (plan(None), "full: no deadline is known; it takes about 40 s"),
        (plan(9, saved_step=120), "skip: step 120 is saved already"),
    ],
)
def test_the_plan_says_why(found, words):
    assert str(found).startswith(f"emergency save: {words}")


def test_rates_are_unknown_before_anything_was_measured():
    rates = Rates()
    assert (rates.write, rates.upload) == (None, None)
    rates.wrote(0, 1.0)
    rates.uploaded(100, 0.0)
    assert (rates.write, rates.upload) == (None, None)


def test_the_newest_counts_most():
    rates = Rates()
    rates.wrote(100 * MB, 1)
    assert rates.write == 100e6
    rates.wrote(100 * MB, 4)  # (100 / 2 + 100) MB in (1 / 2 + 4) s
    assert rates.write == pytest.approx(150e6 / 4.5)
    assert rates.upload is None
    for _ in range(20):
        rates.wrote(100 * MB, 2)
    assert rates.write == pytest.approx(50e6, rel=1e-4)


def test_a_small_file_hardly_moves_the_rate():
    rates = Rates()
    rates.uploaded(1000 * MB, 10)
    rates.uploaded(1000, 0.1)  # 10 kB/s, for its latency
    assert rates.upload == pytest.approx(500.001e6 / 5.1)


def test_rates_may_be_counted_by_many_threads():
    rates = Rates()

    def count():
        for _ in range(500):
            rates.wrote(10, 1)
            rates.uploaded(30, 1)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (rates.write, rates.upload) == (pytest.approx(10), pytest.approx(30))
