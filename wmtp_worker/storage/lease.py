"""The lease on a run in the bucket: one worker at a time, and a number by which what others write late is known.

Who takes the lease gets the next epoch, by a conditional write of `lease.json`; a heartbeat thread renews it. A lease
that is free, has run out, or belonged to a dead process of the same work directory can be taken. No clock is trusted
with the safety of the work: a worker that was paused and wakes up believes for a moment that it holds the lease still.
What it publishes then carries its old epoch, and nobody goes on from it (`lease_file.counts`, `publish`).
"""

import json
import logging
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Self

from wmtp_worker.errors import (
    CheckpointError,
    ObjectNotFound,
    PreconditionFailed,
    RunHeldError,
    SettingsError,
    StorageError,
    TransientError,
    WorkerError,
)
from wmtp_worker.storage.conditional import check_conditional_put
from wmtp_worker.storage.layout import RunKeys
from wmtp_worker.storage.lease_file import Found, Holder, LeaseFile, read_lease
from wmtp_worker.storage.objects import ObjectStore
from wmtp_worker.storage.seldom import Seldom

log = logging.getLogger(__name__)

_SLACK = 2.0  # seconds: servers tell times in whole ones
_SLICE = 0.2
_GRACE_SECONDS = 5.0
_ATTEMPTS = 5
# some clocks stand still while the machine sleeps
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def clock() -> float:
    """Seconds that pass while the process is stopped and, where the system has such a clock, while it sleeps."""
    return time.clock_gettime(_CLOCK)


class Lease:
    """The right to publish one run, from `acquire` to `release`, unless somebody else takes it. Thread-safe."""

    def __init__(
        self,
        store: ObjectStore,
        keys: RunKeys,
        seconds: float,
        workdir_id: str | None,
        check: Callable[[], None],
        clock: Callable[[], float],
        sleep: Callable[[float], None],
    ) -> None:
        """Holds nothing yet: see `acquire`."""
        self._store = store
        self._keys = keys
        self._seconds = seconds
        self._holder = Holder.this(workdir_id)
        self._check = check
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()  # held while lease.json is written
        self._file: LeaseFile
        self._version = ""
        self._confirmed = 0.0
        self._reachable = True
        self._lost: RunHeldError | None = None
        self._misses: Counter[str] = Counter()
        self._status: Callable[[], Mapping[str, Any]] | None = None
        self._stop = threading.Event()
        self._renewed = threading.Event()
        self._threads: list[threading.Thread] = []
        self._seldom = Seldom(log)

    # --- to take it ------------------------------------------------------------------------------------------

    @classmethod
    def acquire(
        cls,
        store: ObjectStore,
        keys: RunKeys,
        *,
        seconds: float,
        wait: float = 0,
        workdir_id: str | None = None,
        check: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = clock,
        sleep: Callable[[float], None] = time.sleep,
    ) -> Self:
        """Take the lease of a run, under a new epoch. Of any number that try at once one gets it.

        `seconds` is how long it lasts without renewal; a holder that is alive is waited for, `wait` seconds. Who gives
        a `workdir_id` must hold the run's lock in that directory. `check` is polled while waiting and may raise. Raises
        `RunHeldError` where another worker holds the run and is alive, `SettingsError` where the server does not know
        conditional writes, `CheckpointError` for a lease of a newer format, `TransientError` where the server refuses
        to change a lease that nobody else changes, and the store's errors.
        """
        lease = cls(store, keys, seconds, workdir_id, check, clock, sleep)
        lease._acquire(wait)
        return lease

    def _acquire(self, wait: float) -> None:
        watched, free_at, alive_since, said = "", 0.0, None, False
        while True:
            self._check()
            found = read_lease(self._store, self._keys.lease)
            if found is None or self._is_free(found):
                if self._take(found):
                    return
                continue
            assert found.file is not None
            if found.version != watched:
                age = self._age(found)
                if watched and alive_since is None:
                    alive_since = self._clock()
                # the time after: to ask for the age may take long
                watched, free_at = found.version, self._clock() + found.file.seconds + _SLACK - age
            now = self._clock()
            if now >= free_at:
                log.warning("the lease of %s ran out: taking over", found.file.holder)
                if self._take(found):
                    return
                continue
            if alive_since is not None and now - alive_since >= wait:
                raise held(found.file.holder, found.file.epoch, self._where)
            if not said:
                log.info("%s holds this run: waiting to see whether it is alive", found.file.holder)
                said = True
            self._pause(min(1.0, found.file.seconds / 6, free_at - now))

    def _is_free(self, found: Found) -> bool:
        if found.file is None:
            log.warning("the lease %s is malformed: nobody holds it", self._where)
            return True
        file, ours = found.file, self._holder.workdir_id
        # we have the work directory's lock: whoever had it before on this machine is gone
        is_here = ours is not None and (file.holder.workdir_id, file.holder.host) == (ours, self._holder.host)
        return file.released or is_here

    def _age(self, found: Found) -> float:
        """Seconds since the lease was written, by the server's own clock; 0 where that cannot be told."""
        if found.modified is None:
            return 0.0
        probe = f"{self._keys.probes}{uuid.uuid4().hex}"
        try:
            self._store.put(probe, b"what time is it?")
            now = self._store.head(probe).modified
            self._store.delete(probe)
        except ObjectNotFound:
            return 0.0
        return max(0.0, (now - found.modified).total_seconds()) if now is not None else 0.0

    def _take(self, found: Found | None) -> bool:
        """Write our name into a lease that is free; whether we were first."""
        before = found.file if found is not None else None
        epoch = 1 + (self._newest_epoch() if before is None else before.epoch)
        epochs = () if before is None else before.epochs
        file = LeaseFile(epoch=epoch, holder=self._holder, seconds=self._seconds, epochs=epochs)
        try:
            if found is None:
                self._check_server()
            began = self._clock()
            if found is None:
                info = self._store.put(self._keys.lease, file.data(), if_absent=True)
            else:
                info = self._store.put(self._keys.lease, file.data(), if_version=found.version)
        except (PreconditionFailed, ObjectNotFound):
            self._missed("" if found is None else found.version)
            return False
        self._file, self._version, self._confirmed = file, info.version, began
        log.info("holding the run in the bucket: epoch %d", epoch)
        return True

    def _missed(self, version: str) -> None:
        """Another was first; or the server refuses what it should not, and is asked ever more slowly."""
        self._misses[version] += 1
        if self._misses[version] >= _ATTEMPTS:
            raise TransientError("the server refuses to change the lease, though nobody else does", where=self._where)
        self._pause(self._misses[version] - 1)

    def _newest_epoch(self) -> int:
        """The newest epoch that objects tell of: somebody may have deleted the lease."""
        infos = (info for root in self._keys.roots for info in self._store.list(root))
        return max((place.epoch for info in infos if (place := self._keys.place(info.key))), default=0)

    def _check_server(self) -> None:
        try:
            if not check_conditional_put(self._store, self._keys.probes):
                log.warning(
                    "%s ignores versions in deletions (DELETE with If-Match): a worker that is paused within one may "
                    "delete what a newer worker has published meanwhile",
                    self._store.url,
                )
        except SettingsError as error:
            if read_lease(self._store, self._keys.lease) is not None:
                return  # another was first, and has swept what it was tried with: no fault of the server
            fix = (
                f"{error.fix}; or set checkpoint.lease=false, and see to it yourself that one worker alone trains a run"
            )
            raise SettingsError(error.what, where=error.where, fix=fix) from None

    def _pause(self, seconds: float) -> None:
        while seconds > 0:
            self._check()
            self._sleep(min(seconds, _SLICE))
            seconds -= _SLICE

    # --- to hold it ------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The number of this lease: greater than that of any before it."""
        return self._file.epoch

    @property
    def lost(self) -> bool:
        """Whether another worker has taken the run. For good."""
        return self._lost is not None

    @property
    def epochs(self) -> tuple[tuple[int, int], ...]:
        """Each epoch that began, and the step it went on from."""
        return self._file.epochs

    def check(self) -> None:
        """Raises `RunHeldError` once another worker has taken the run. Asks the bucket nothing."""
        if self._lost is not None:
            # a new one each time: it may be raised in several threads
            raise RunHeldError(self._lost.what, where=self._lost.where, fix=self._lost.fix)

    def ensure(self, *, fresh: bool = False) -> None:
        """To be called right before what only the holder may do: raises `RunHeldError` where that is another worker.

        Asks the bucket only if the last renewal is half a lease ago (this process may have been stopped since), or,
        with `fresh`, always: then all that was written before was written by the holder. Raises the store's errors
        where the bucket cannot tell: nothing must be published then.
        """
        self.check()
        if fresh or self._clock() - self._confirmed >= self._seconds / 2:
            self.renew()

    def renew(self) -> None:
        """Write the lease anew. Raises `RunHeldError` where it is another's, and the store's errors."""
        self._write()

    def began(self, step: int) -> None:
        """Record from which step this epoch goes on, before it publishes anything. Raises as `renew` does."""
        if (self.epoch, step) not in self._file.epochs:
            others = tuple(entry for entry in self._file.epochs if entry[0] != self.epoch)
            self._write(epochs=(*others, (self.epoch, step)))

    def _write(self, **changes: Any) -> None:
        with self._lock:
            renewals = self._file.renewals
            for _ in range(_ATTEMPTS):
                self.check()
                renewals += 1
                file = self._file.model_copy(update={**changes, "renewals": renewals})
                # the time before: the lease runs from when the server got it
                began = self._clock()
                try:
                    version = self._put(file)
                except (PreconditionFailed, ObjectNotFound):
                    renewals = max(renewals, self._look())
                    continue
                except StorageError:
                    self._reachable = False
                    raise
                self._file, self._version, self._confirmed, self._reachable = file, version, began, True
                return
            raise TransientError("the lease keeps changing", where=self._where)

    def _put(self, file: LeaseFile) -> str:
        if self._version:
            return self._store.put(self._keys.lease, file.data(), if_version=self._version).version
        return self._store.put(self._keys.lease, file.data(), if_absent=True).version

    def _look(self) -> int:
        """See who wrote the lease: we ourselves, by an answer that was lost, or another, who holds it then.

        Returns the number of renewals that it has. One that somebody deleted is to be written again.
        """
        try:
            found = read_lease(self._store, self._keys.lease)
        except CheckpointError as error:  # by a worker of a newer version
            raise self.lose() from error
        if found is None:
            self._version = ""
            return 0
        if found.file is not None and found.file.holder.nonce == self._holder.nonce:
            self._version = found.version
            return found.file.renewals
        raise self.lose(found.file)

    def lose(self, file: LeaseFile | None = None) -> RunHeldError:
        """Know from now on that the run is another's; returns the error that says so."""
        if self._lost is None:
            who = f"{file.holder} (epoch {file.epoch})" if file is not None else "another worker"
            self._lost = RunHeldError(
                f"this run was taken over by {who}: epoch {self.epoch} may publish nothing more",
                where=self._where,
                fix="what is not in the bucket stays in the work directory; stop the other worker before you start "
                "this one again",
            )
            log.error("%s", self._lost)
        return self._lost

    @property
    def _where(self) -> str:
        return f"{self._store.url}/{self._keys.lease}"

    # --- heartbeat -------------------------------------------------------------------------------------------

    def start(self, status: Callable[[], Mapping[str, Any]] | None = None) -> None:
        """Renew from now on, three times a lease, in a thread of its own; `close` ends it.

        What `status` returns is put into `heartbeat.json` now, after each renewal and before the release, by another.
        """
        self._status = status
        self._renewed.set()
        jobs = {"lease": self._keep_renewing, **({} if status is None else {"heartbeat": self._keep_telling})}
        self._threads = [threading.Thread(target=job, name=name, daemon=True) for name, job in jobs.items()]
        for thread in self._threads:
            thread.start()

    def _keep_renewing(self) -> None:
        while not self._stop.wait(self._until_renewal):
            try:
                self.renew()
                self._renewed.set()
            except RunHeldError:
                return
            except WorkerError as error:
                self._seldom.warn("renewal", "the lease could not be renewed: %s", error)
            except Exception:  # a bug must not end the training either
                log.exception("the lease could not be renewed, by a bug")

    @property
    def _until_renewal(self) -> float:
        # a third of a lease after the last one, or soon where that is past: an outage is not to outlast the lease
        return max(self._seconds / 12, self._confirmed + self._seconds / 3 - self._clock())

    def _keep_telling(self) -> None:
        # a thread of its own: trouble with the heartbeat must not delay a renewal
        while True:
            self._renewed.wait()
            self._renewed.clear()
            if self._stop.is_set():
                return
            self._tell()

    def _tell(self, **facts: Any) -> None:
        if self._status is None:
            return
        try:
            holder = self._holder.model_dump()
            document = {"time": time.time(), "epoch": self.epoch, "holder": holder, **self._status(), **facts}
            self._store.put(self._keys.heartbeat, (json.dumps(document) + "\n").encode())
        except WorkerError as error:
            self._seldom.warn("heartbeat", "the heartbeat is not in the bucket: %s", error)
        except Exception:
            log.exception("the heartbeat is not in the bucket, by a bug")

    def release(self) -> None:
        """Let the next worker have the run at once. Where the bucket is away, the lease runs out by itself."""
        self._end()
        if self.lost or not self._reachable:
            return
        self._tell(phase="ended")
        try:
            self._write(released=True)
        except WorkerError as error:
            log.info("the lease is not released, and runs out by itself: %s", error)

    def close(self) -> bool:
        """End the lease's threads; whether they ended. One that hangs in the network is left behind."""
        self._end()
        for thread in self._threads:
            thread.join(_GRACE_SECONDS)
        return not any(thread.is_alive() for thread in self._threads)

    def _end(self) -> None:
        self._stop.set()
        self._renewed.set()


def held(holder: Holder, epoch: int, where: str) -> RunHeldError:
    """The error for a run that another worker trains."""
    return RunHeldError(
        f"the run is being trained by {holder} (epoch {epoch}), which renews its lease",
        where=where,
        fix="wait for it (checkpoint.lease_wait), stop it, or choose another --run-name",
    )
