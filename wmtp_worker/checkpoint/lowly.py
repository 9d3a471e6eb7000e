"""Work beside the training: a thread at a low priority, that takes a small share of the processors, and rests."""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from wmtp_worker.host.limits import cpu_limit

log = logging.getLogger(__name__)

# by the scheduler's weights 3 % of a core that the training wants too; at 19, 1.5 %, it would take twice as long there
_NICE = 15
# of all cores: the training, which can use them all, is slower by as much, and by what the copy before it takes
_SHARE = 0.03
_SCHEDSTAT = Path("/proc/thread-self/schedstat")


def step_back() -> None:
    """Lower the priority of this thread, and of those it starts, as far as the system can."""
    if sys.platform != "linux":  # elsewhere it would be the whole process
        return
    try:
        thread = threading.get_native_id()
        # never a higher one than the whole process was given
        os.setpriority(os.PRIO_PROCESS, thread, max(_NICE, os.getpriority(os.PRIO_PROCESS, thread)))
    except OSError as error:
        log.debug("the priority of %s stays as it is: %s", threading.current_thread().name, error)


class Pace:
    """Rests between pieces of work, so that the work takes a small share of the processors. For one thread.

    A thread at a low priority alone does not do that: wherever the training's own threads wait for each other, it has
    a core, and they wait for it then. `rest(seconds)` may return early; `rested` are all seconds it took.
    """

    def __init__(self, rest: Callable[[float], object]) -> None:
        self._rest = rest
        self._share = _SHARE * cpu_limit()
        self._worked, self._began = time.thread_time(), time.perf_counter()
        self.rested = 0.0

    def keep(self) -> None:
        """To be called after each piece of work."""
        worked, began = time.thread_time(), time.perf_counter()
        seconds = (worked - self._worked) / self._share - (began - self._began)
        if seconds > 0:
            self._rest(seconds)
        self._worked, self._began = worked, time.perf_counter()
        self.rested += self._began - began


def waiting() -> float:
    """Seconds that this thread was ready to run, so far, and did not get a processor; 0 where nobody tells."""
    try:
        return int(_SCHEDSTAT.read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0
