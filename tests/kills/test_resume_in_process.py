"""Whatever line a run is stopped at, going on ends in the same bits as never having been stopped."""

import contextlib
import itertools
import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import wmtp_worker
from wmtp_worker.errors import Interrupted
from wmtp_worker.host.stop import StopRequest

PACKAGE = str(Path(wmtp_worker.__file__).parent)
MOMENTS = 12


class Killed(BaseException):
    """Like SIGKILL, nothing in the worker may catch it."""


# in the middle of what torch's writer of zip files calls, that ends with an error of its own
KILLED = (Killed, RuntimeError)


class LineCounter:
    """Calls `action` when the `target`-th line of the worker's own code is about to run in this thread."""

    def __init__(self, target: int, action: Callable[[], None]) -> None:
        self.lines = 0
        self._target = target
        self._action = action

    def __enter__(self) -> "LineCounter":
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, argument: object) -> Any:
        return self._line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def _line(self, frame: FrameType, event: str, argument: object) -> Any:
        if event == "line":
            self.lines += 1
            if self.lines == self._target:
                self._action()
        return self._line


def _kill() -> None:
    raise Killed


@pytest.fixture(scope="module")
def reference(tiny_run, run_record, tmp_path_factory):
    """The run that is never stopped: what it leaves, and how many lines to choose a moment from.

    Counted once everything is imported. A run has some lines more or fewer than another, for heartbeats go by the
    clock, so the last hundredth is left out: a moment after the end stops nothing.
    """
    tiny_run(tmp_path_factory.mktemp("imports"))
    workdir = tmp_path_factory.mktemp("reference")
    with LineCounter(0, _kill) as counter:
        tiny_run(workdir)
    return run_record(workdir), counter.lines * 99 // 100


def moments(kind: str) -> list[int]:
    """Seeds, not lines: the number of lines is known only once the reference has run."""
    return random.Random(kind).sample(range(10**6), MOMENTS)


@pytest.mark.parametrize("moment", moments("kill"))
def test_killed_at_a_random_line(moment, reference, tiny_run, run_record, tmp_path):
    expected, lines = reference
    target = moment % lines + 1
    for attempt in itertools.count():
        workdir = tmp_path / str(attempt)
        with LineCounter(target, _kill) as counter, contextlib.suppress(*KILLED):
            tiny_run(workdir)
        if counter.lines >= target:
            break
        target = counter.lines * 9 // 10  # waiting goes by the clock: this one ended before the moment
    tiny_run(workdir)
    assert run_record(workdir) == expected


@pytest.mark.parametrize("moment", moments("stop"))
def test_asked_to_stop_at_a_random_line(moment, reference, tiny_run, run_record, tmp_path):
    expected, lines = reference
    stop = StopRequest()
    # a stop asked for after the last poll comes too late to interrupt anything
    with LineCounter(moment % lines + 1, lambda: stop.request("test")), contextlib.suppress(Interrupted):
        tiny_run(tmp_path, stop=stop)
    tiny_run(tmp_path)
    assert run_record(tmp_path) == expected


def test_the_comparison_can_fail(reference, tiny_run, run_record, tmp_path):
    expected, _ = reference
    tiny_run(tmp_path, "training.lr=1.1e-3")
    assert run_record(tmp_path) != expected


def test_tracing_leaves_other_threads_alone():
    # the counter counts the training thread only; it must not slow or stop others
    seen = []
    with LineCounter(1, _kill):
        thread = threading.Thread(target=lambda: seen.append(sys.gettrace()))
        thread.start()
        thread.join()
    assert seen == [None]
