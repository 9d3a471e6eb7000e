"""Doing the same to several files at once."""

import subprocess
import sys

import pytest

from wmtp_worker.storage.sealed import each

HANGS = """
import threading, time
from wmtp_worker.storage.sealed import each
threading.Thread(target=each, args=(lambda name: time.sleep(60), range(3)), daemon=True).start()
time.sleep(0.2)
"""


def test_after_an_error_no_further_one_begins():
    seen = []

    def job(number):
        seen.append(number)
        if number == 0:
            raise KeyError("the first")

    with pytest.raises(KeyError, match="the first"):
        each(job, range(1000))
    assert 0 in seen
    assert len(seen) < 1000


def test_one_that_hangs_does_not_keep_the_process():
    subprocess.run([sys.executable, "-c", HANGS], check=True, timeout=120)
