"""How a run is saved: when, behind the loop, into the bucket, and in an emergency; and what that cost."""

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from wmtp_worker.checkpoint import store
from wmtp_worker.checkpoint.emergency import Rates, choose
from wmtp_worker.checkpoint.interval import IntervalPolicy
from wmtp_worker.checkpoint.ledger import Ledger
from wmtp_worker.checkpoint.losses import FIRST_STEP, summarise
from wmtp_worker.checkpoint.ranks import ALONE, Ranks
from wmtp_worker.checkpoint.saver import Saver
from wmtp_worker.checkpoint.snapshot import OPTIMIZER, Snapshot
from wmtp_worker.checkpoint.tensorfile import Tensors
from wmtp_worker.errors import WorkerError
from wmtp_worker.host.stop import StopRequest
from wmtp_worker.settings import Settings
from wmtp_worker.storage.layout import RunPaths, step_name
from wmtp_worker.training.bucket import RunBucket

log = logging.getLogger(__name__)


class Saving:
    """The saves of one process of a run. A context manager: leaving it finishes what is being written.

    `inspect` sees a step and its copied tensors, by file and name, in the writer's thread before they are written, and
    raises where they must not be; the next `save` or `finish` raises that. A full disk, and a bucket that is away,
    never do.
    """

    def __init__(
        self,
        settings: Settings,
        paths: RunPaths,
        bucket: RunBucket,
        ledger: Ledger,
        resumed_from: int | None,
        inspect: Callable[[int, Mapping[str, Tensors]], None],
        tick: Callable[[], None],
        writers: Ranks = ALONE,
        ranks: Ranks = ALONE,
    ) -> None:
        """`writers`: the ranks that write a checkpoint together, for the writer's thread, and `ranks`: the same for
        the caller's; each must make the same calls.
        """
        self._ranks = ranks
        self._keep = settings.checkpoint
        self._paths = paths
        self._bucket = bucket
        self._ledger = ledger
        self._resumed_from = resumed_from
        self._newest = resumed_from or 0
        self._running = False
        self._rates = Rates()
        self._begun: dict[int, float] = {}  # step -> when its save began
        self._pause: float | None = None  # of the save that is being copied
        self._waited = 0.0  # at the gate of this step
        self._wrote = False  # since the last step
        self._full_bytes = self._trainable_bytes = 0
        self.policy = IntervalPolicy(
            self._keep.every, self._keep.interruptions_per_day, summarise(ledger.events).history
        )
        self._saver = Saver(
            paths,
            background=self._keep.background,
            ranks=writers,
            buffers=self._keep.buffers,
            written=self._written,
            make_room=self.make_room,
            inspect=inspect,
            tick=tick,
        )
        bucket.on_published = self._published

    def prepare(self, tensors: Mapping[str, Tensors], exported: Tensors, to_come: int) -> None:
        """Take the memory for copies of these tensors (meta tensors will do), and say how much that is.

        `exported` are those of the best model; `to_come` bytes are left for the training.
        """
        sizes = {name: sum(tensor.nbytes for tensor in file.values()) for name, file in tensors.items()}
        self._full_bytes = sum(sizes.values())
        self._trainable_bytes = self._full_bytes - sizes.get(OPTIMIZER, 0)
        taken = self._saver.prepare(tensors, exported, to_come)
        how = f"{taken / 1e6:.1f} MB of memory for copies" if taken else "the training waits for each"
        log.info("a checkpoint has %.1f MB; %s", self._full_bytes / 1e6, how)

    # --- in the loop -----------------------------------------------------------------------------------------

    def due(self, step: int, saved_at: int) -> bool:
        """Whether it is time to save after `step`, when the last save was after `saved_at`."""
        return self.policy.due(step, saved_at)

    def save(self, take: Callable[[], Snapshot]) -> None:
        """Begin a save of the snapshot and return. Nothing in it may change before `gate`."""
        started, begun = time.perf_counter(), time.monotonic()
        snapshot = take()
        self._begun[snapshot.step] = begun
        self._saver.save(snapshot, since=started)
        self._pause = time.perf_counter() - started

    def export(self, path: Path, step: int, tensors: Tensors, facts: Mapping[str, Any]) -> None:
        """Begin to write the best model and return. No tensor may change before `gate`.

        It is on the disk before any checkpoint of a save that is begun later.
        """
        self._saver.export(path, step, tensors, facts)

    def gate(self) -> None:
        """Wait until the last save is copied: to be called before anything changes weights or moments."""
        started = time.perf_counter()
        self._saver.gate()
        waited = time.perf_counter() - started
        self._waited += waited
        if self._pause is not None:
            self.policy.saved(self._pause + waited)
            self._pause = None

    def stepped(self, seconds: float) -> None:
        """A step took so long, the wait at the gate included."""
        if not self._running:
            self._running = True
            self._ledger.phases.done(FIRST_STEP)
            self._ledger.running(self._resumed_from)
        seconds, self._waited = seconds - self._waited, 0.0
        # one that was written and gone within the step slowed it down, too
        wrote, self._wrote = self._wrote, False
        self.policy.step(seconds, saving=wrote or bool(self._saver.pending) or self._bucket.uploading)

    # --- at the end ------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Wait until all saves are on the disk. Raises what went wrong with one."""
        self._saver.flush()

    def emergency(self, snapshot: Callable[[], Snapshot], step: int, saved_at: int, stop: StopRequest) -> None:
        """Save what the time left allows: everything, only what is trained, or nothing more; says which and why.

        Raises `DiskFullError`, and what was wrong with an earlier save.
        """
        # what waits to be written is dropped for this save, and not uploaded either
        uploads = len(self._bucket.unpublished) + (self._saver.writing is not None)
        on_disk = saved_at in self._paths.steps() or saved_at in self._saver.pending
        mine = choose(
            step=step,
            saved_step=saved_at if on_disk else 0,
            full_bytes=self._full_bytes,
            trainable_bytes=self._trainable_bytes,
            write_rate=self._rates.write,
            upload_rate=self._rates.upload,
            seconds_left=stop.seconds_left,
            uploads=self._bucket.url is not None,
            must_upload=stop.machine_goes,
            unwritten_bytes=self._saver.before_now,
            queued_bytes=uploads * self._full_bytes,
        )
        plan = self._ranks.gather(mine)[0]
        log.info("%s", plan)
        if plan.kind == "skip":
            self._saver.flush(stop.seconds_left)
        else:
            self._begun[step] = time.monotonic()
            self._saver.save_now(snapshot(), plan.kind)

    # --- behind the loop -------------------------------------------------------------------------------------

    def _written(self, step: int, folder: Path) -> None:
        """In the writer's thread: the checkpoint is whole on the disk."""
        self._newest, self._wrote = step, True
        self._bucket.saved(step)
        cost = self._saver.last
        if cost is not None and cost.step == step:
            self._rates.wrote(cost.bytes, cost.busy)
            self._ledger.save(
                step,
                cost.pause,
                cost=self.policy.cost,
                carry=self.policy.carry,
                seconds_per_step=self.policy.step_seconds,
                kind=cost.kind,
            )
        if self._bucket.url is None:
            self._carried(step)
        try:
            self._prune(step)
        except WorkerError as error:  # the checkpoint is saved all the same
            log.warning("old checkpoints are not removed: %s", error)

    def _published(self, step: int, seconds: float, sent: int) -> None:
        """In the uploads' thread: the checkpoint is in the bucket, for which `sent` bytes took so long."""
        self._rates.uploaded(sent, seconds)
        self._carried(step)

    def _carried(self, step: int) -> None:
        begun = self._begun.get(step)
        for done in [other for other in list(self._begun) if other <= step]:  # others were dropped, or replaced
            self._begun.pop(done, None)
        if begun is not None:
            self.policy.carried(time.monotonic() - begun)

    def _prune(self, newest: int) -> None:
        spare = self._bucket.unpublished
        removed = store.prune(self._paths, self._keep.keep_last, newest, spare, keep_every=self._keep.keep_every)
        if removed:
            log.info("removed %s", ", ".join(map(step_name, removed)))

    def make_room(self) -> None:
        """The disk is full: keep only the newest checkpoint, and what the bucket has not got yet."""
        spare = self._bucket.unpublished
        try:
            removed = store.prune(self._paths, 1, self._newest, spare, keep_every=self._keep.keep_every)
            log.warning("the disk is full: removed %s", ", ".join(map(step_name, removed)) or "nothing")
        except WorkerError as error:  # there may be room all the same
            log.warning("the disk is full, and old checkpoints are not removed: %s", error)

    def close(self) -> None:
        """Finish what is being written, and join the threads."""
        self._saver.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
