"""What is done in threads while the run waits for it: a network that hangs keeps nobody from heeding a stop."""

import threading
import time
from collections.abc import Callable

from wmtp_worker.errors import StorageError

_GRACE_SECONDS = 3.0


class GivenUpError(StorageError):
    """Raised in one thread because of the error of another."""


class Errands:
    """Jobs in threads of their own. The first that fails ends all, as does what `check` raises in whoever waits."""

    def __init__(self, check: Callable[[], None], tick: Callable[[], None]) -> None:
        """`check` raises to stop everything; `tick` is called about five times a second while somebody waits."""
        self._check = check
        self._tick = tick
        self._threads: dict[str, threading.Thread] = {}
        self._errors: list[BaseException] = []  # only ever appended to
        self._ended = False

    def start(self, name: str, job: Callable[[], object]) -> None:
        """Begin a job, which is to call `poll` now and then. A daemon: one that hangs keeps no process alive."""
        self._threads[name] = threading.Thread(target=self._do, args=(job,), name=f"bucket-{name}", daemon=True)
        self._threads[name].start()

    def _do(self, job: Callable[[], object]) -> None:
        try:
            job()
        except BaseException as error:
            self._errors.append(error)

    def wait_for(self, name: str) -> None:
        """Until a job has ended. The first error of any, or of `check`, ends the others and is raised."""
        try:
            while self._threads[name].is_alive() and not self._errors:
                self._threads[name].join(0.2)
                self._tick()
                self._check()
            self.raise_error()
        except BaseException as error:
            self._errors.append(error)  # so that the others give up
            raise

    def raise_error(self) -> None:
        """Raise what went wrong in a job, if anything has."""
        for error in self._errors:
            if not isinstance(error, GivenUpError):
                raise error

    def poll(self) -> None:
        """For the jobs: raises what `check` raises, and `GivenUpError` once anything else has failed."""
        self._check()
        if self._errors:
            raise GivenUpError("given up, because something else failed")

    def end(self) -> bool:
        """Make the jobs give up and wait a little for that, the first time; whether all have ended."""
        alive = [thread for thread in self._threads.values() if thread.is_alive()]
        if alive and not self._ended:
            self._errors.append(GivenUpError("given up, because the run ends"))
            deadline = time.monotonic() + _GRACE_SECONDS
            for thread in alive:
                thread.join(max(0.0, deadline - time.monotonic()))
        self._ended = True
        return not any(thread.is_alive() for thread in alive)
