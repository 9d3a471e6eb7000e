"""Threads that run when nothing else wants the processor, and how long they waited for it."""

import logging
import os
import sys
import threading
import time
from pathlib import Path

log = logging.getLogger(__name__)

# by the scheduler's weights 3 % of a core that the training wants too; at 19, 1.5 %, it would take twice as long there
_NICE = 15
_SCHEDSTAT = Path("/proc/thread-self/schedstat")


def step_back() -> None:
    """Let this thread, and those it starts, run when nothing else wants the processor, as far as the system can."""
    if sys.platform != "linux":  # elsewhere it would be the whole process
        return
    thread = threading.get_native_id()
    try:
        os.setpriority(os.PRIO_PROCESS, thread, _NICE)
    except OSError as error:
        log.debug("the priority of %s stays as it is: %s", threading.current_thread().name, error)


class Undisturbed:
    """A clock that stands still while this thread is ready to run and gets no processor.

    So what a thread at a low priority measures holds for one at an ordinary priority too. To be read by the thread
    that made it. Where the system does not tell, it is an ordinary clock.
    """

    def __init__(self) -> None:
        self._began = self._now()

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return max(0.0, self._now() - self._began)

    def _now(self) -> float:
        try:
            waited = int(_SCHEDSTAT.read_text().split()[1]) / 1e9
        except (OSError, ValueError, IndexError):
            waited = 0.0
        return time.perf_counter() - waited
