"""Workers as the model check drives them: the real code of lease, publish and retention, one store call at a time.

Each worker runs in a thread that waits before every call to the bucket, until the test says how that call shall end:
well, with an answer that is lost, not at all, or with the death of the worker before it, after it, or while it is still
on its way. Between a worker's last look at its lease and the write that follows, anything may happen. On a server that
ignores the condition of a DELETE, one thing may not: that a worker is paused between its look at an object's version
and the deletion that follows at once.
"""

import hashlib
import json
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tenacity import wait_none

from tests.storage.memory import MemoryStore
from wmtp_worker.errors import ExhaustedError, IntegrityError, RunHeldError, TransientError
from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.storage.lease import Lease
from wmtp_worker.storage.lease_file import counts, read_epochs
from wmtp_worker.storage.objects import ObjectInfo
from wmtp_worker.storage.published import Catalogue, View, objects_of
from wmtp_worker.storage.retry import RetryingStore
from wmtp_worker.storage.runs import RunSync
from wmtp_worker.storage.seal import FileEntry, parse_seal
from wmtp_worker.storage.transfer import Report

SECONDS = 3.0  # of a lease
KEEP_LAST = 2
FROZEN = b"frozen" * 20_000  # large enough to be worth a copy
GRACE = 120.0


class Killed(BaseException):
    """The worker is dead: nothing it would still do happens."""


class World:
    """The bucket, the time, and what is known to have happened."""

    def __init__(self, conditional_delete: bool = True) -> None:
        self.now = 1000.0
        self.bucket = MemoryStore(lambda: self.now, conditional_delete)
        self.keys = RunPaths(Path(), "tiny").keys
        self.in_flight: list[Callable[[], Any]] = []  # calls of dead workers that the network still carries
        self.began: dict[int, int] = {}  # epoch to the step it went on from
        self.safe: dict[int, int] = {}  # step to the epoch that was told it is safe
        self.went_back: dict[int, int] = {}  # epoch to the step that the user sent it back to
        self.newest_epoch = 0
        self.problems: list[str] = []
        self.log: list[str] = []
        self.broken = False
        self._checked = (0, 0)
        self._digests: dict[str, str] = {}  # by version

    def view(self) -> View:
        return Catalogue(self.bucket, self.keys).look()

    def chosen(self, epoch: int, step: int, published_by: int | None) -> None:
        """A worker decided where to go on: at no less than what others were told is safe, in nobody's shadow."""
        if (newest := max(self.safe, default=0)) > step:
            self.problems.append(f"epoch {epoch} goes on from {step}, and {newest} was safe")
        for later, start in self.began.items():
            if published_by is not None and published_by < later < epoch and start < step:
                self.problems.append(
                    f"epoch {epoch} goes on from step {step} of {published_by}, though {later} began at {start}"
                )
        self.began[epoch] = step

    def check(self) -> None:
        """What must be true at every moment. Raises `AssertionError` with all that happened."""
        try:
            self._check()
        except AssertionError as error:
            self.broken = True
            raise AssertionError("\n".join([*self.log, str(error)])) from None

    def _check(self) -> None:
        if self.problems:
            raise AssertionError("\n".join(self.problems))
        if self._checked == (self.bucket.changes, len(self.safe)):
            return
        self._checked = self.bucket.changes, len(self.safe)
        view = self.view()
        for step in view.steps:
            published = view.manifests[step]
            assert published.seal is not None, f"step {step} is malformed"
            if not view.whole(step):
                # only what a worker wrote after it was taken for dead; nobody goes on from it
                assert published.epoch < self.newest_epoch, f"step {step} of {published.epoch} is not whole"
                continue
            for key, entry in objects_of(self.keys, step, published.seal).items():
                info, data = self.bucket.objects[key]
                if (digest := self._digests.get(info.version)) is None:
                    digest = self._digests[info.version] = hashlib.sha256(data).hexdigest()
                assert digest == entry.sha256, f"{key} is not what the manifest says"
        newest = max((step for step in view.steps if view.whole(step)), default=0)
        assert newest >= max(self.safe, default=0), f"step {max(self.safe)} was safe, and {newest} is the newest"


class Gate:
    """A worker's way to the bucket: each call waits for the test."""

    url = MemoryStore.url

    def __init__(self, worker: "Worker", bucket: MemoryStore) -> None:
        self._worker = worker
        self._bucket = bucket
        self._looked_at = ""

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._bucket, name)

        def call(*arguments: Any, **options: Any) -> Any:
            key, looked_at, self._looked_at = arguments[0], self._looked_at, ""
            if name == "delete" and not self._bucket.conditional_delete and looked_at == key:
                return method(*arguments, **options)
            result = self._worker.call(lambda: method(*arguments, **options), f"{name} {key}")
            self._looked_at = key if name == "head" else ""
            return result

        def listing(*arguments: Any, **options: Any) -> Any:
            yield from self._worker.call(lambda: list(method(*arguments, **options)), f"{name} {arguments[0]}")

        return listing if name == "list" else call


class Direct:
    """What `RunSync` needs of a `Transfer`, without threads."""

    def __init__(self, store: Any) -> None:
        self.store = store

    def upload_file(self, path: Path, key: str, *, sha256: str | None = None) -> ObjectInfo:
        return self.store.put(key, path.read_bytes(), sha256=sha256)

    def download_file(self, key: str, path: Path, *, sha256: str | None = None) -> ObjectInfo:
        info, data = self.store.get(key)
        if sha256 not in (None, hashlib.sha256(data).hexdigest()):
            raise IntegrityError("another digest", where=key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return info

    def begun(self, sha256: str) -> list[str]:
        return []

    def pull(self, prefix: str, folder: Path) -> Report:
        return Report()


class Worker:
    """One process, from its start to its death or its end."""

    def __init__(self, world: World, workdir: Path, name: str, rate: float, back: bool, goal: int) -> None:
        """`rate`: how fast its clock runs; `back`: whether it is told to go back to the oldest step."""
        self.world = world
        self.rate = rate
        self.back = back
        self.goal = goal
        self.name = name
        self.paths = RunPaths(workdir, "tiny")
        self.result = ""
        self.epoch = 0
        self._published_by: int | None = None  # the epoch that published where it goes on, if that came from the bucket
        self.next = ""  # the call that it waits to make
        self._dead = False
        self._order = ""
        self._operation: Callable[[], Any] | None = None
        self._parked, self._go = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name=f"model-{name}", daemon=True)
        self._thread.start()
        self._wait()

    # --- for the test ----------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        return not self.result

    def step(self, order: str = "well") -> None:
        """Let the call it waits at end in some way: well, fail, lost, die before, die after, die in flight."""
        if order == "die in flight" and self._operation is not None:
            self.world.in_flight.append(self._operation)
        self._order = order
        self._go.release()
        self._wait()

    def kill(self) -> None:
        if self.alive:
            self.step("die before")
        self._thread.join(GRACE)

    def _wait(self) -> None:
        assert self._parked.acquire(timeout=GRACE), f"{self.name} hangs"

    # --- in its threads --------------------------------------------------------------------------------------

    def call(self, operation: Callable[[], Any], what: str) -> Any:
        if self._dead:
            raise Killed
        self._operation, self.next = operation, what
        self._parked.release()
        self._go.acquire()
        self._operation = None
        self.world.log.append(f"{self.name} (epoch {self.epoch}): {what}, {self._order}")
        if self._order == "fail":
            raise TransientError("no connection")
        if self._order.startswith("die") and self._order != "die after":
            self._dead = True
            raise Killed
        try:
            result = operation()
        except Exception:
            if self._order not in ("lost", "die after"):
                raise
            result = None
        if self._order == "die after":
            self._dead = True
            raise Killed
        if self._order == "lost":
            raise TransientError("the answer was lost")
        return result

    def _sleep(self, seconds: float) -> None:
        def passes() -> None:
            self.world.now += max(seconds, 1.0)

        try:
            self.call(passes, "sleep")
        except TransientError:
            return  # there is no such thing as a sleep that fails

    def _run(self) -> None:
        try:
            self._live()
            self.result = "finished"
        except Killed:
            self.result = "killed"
        except RunHeldError:
            self.result = "held"
        except (ExhaustedError, TransientError):
            self.result = "away"
        except IntegrityError as error:
            self.result = "damaged"
            if not self.back:  # else one that was paused, and then killed, may have left an older step without files
                self.world.problems.append(f"{self.name}: {error!r}")
        except BaseException as error:
            self.world.problems.append(f"{self.name}: {error!r}")
            self.result = "failed"
        finally:
            self._parked.release()

    def _live(self) -> None:
        store = RetryingStore(Gate(self, self.world.bucket), 0, wait=wait_none())
        lease = Lease.acquire(
            store,
            self.paths.keys,
            seconds=SECONDS,
            workdir_id=self.paths.workdir.name,
            clock=lambda: self.world.now * self.rate,
            sleep=self._sleep,
        )
        self.epoch = lease.epoch
        self.world.newest_epoch = max(self.world.newest_epoch, lease.epoch)
        self._tell_the_world(lease)
        side = RunSync(Direct(store), self.paths, lease)  # type: ignore[arg-type]
        step = self._restore(side, lease)
        if step:
            self._publish(side, step)
        side.sweep()
        while step < self.goal:
            step += 1
            write_checkpoint(self.paths, step, f"{self.name}, epoch {self.epoch}")
            self._publish(side, step)
            side.prune(KEEP_LAST, step)
        lease.release()

    def _tell_the_world(self, lease: Lease) -> None:
        """Of this worker's choice, as soon as it is the holder's: when the lease tells of it."""
        write = lease.began

        def began(step: int) -> None:
            write(step)
            if self.epoch not in self.world.began:
                self.world.chosen(self.epoch, step, self._published_by)

        lease.began = began  # type: ignore[method-assign]

    def _restore(self, side: RunSync, lease: Lease) -> int:
        """Go on from the newest checkpoint, or (`back`) from the oldest in the bucket; which step that is."""
        if self.back and (steps := side.published_steps()):
            side.fetch_checkpoint(steps[0])
            # as the training does with what is here, and with what it was told is safe
            for later in self.paths.steps():
                if later > steps[0]:
                    shutil.rmtree(self.paths.step(later))
            self.world.safe = {step: epoch for step, epoch in self.world.safe.items() if step <= steps[0]}
            self.world.went_back[self.epoch] = steps[0]
            side.set_aside_after(steps[0])
            return steps[0]
        fetched = side.fetch_checkpoint("auto")
        step = max(self.paths.steps(), default=0)
        if step and fetched == step:
            self._published_by = parse_seal((self.paths.step(step) / "manifest.json").read_bytes(), "").lease_epoch
        lease.began(step)
        return step

    def _publish(self, side: RunSync, step: int) -> None:
        for _ in range(3):
            try:
                side.publish(step)
            except (ExhaustedError, TransientError):
                continue
            # not where the user has sent a later epoch back behind it since it was told
            if all(later <= self.epoch or step <= start for later, start in self.world.went_back.items()):
                self.world.safe[step] = self.epoch
            return


def write_checkpoint(paths: RunPaths, step: int, maker: str) -> None:
    """A checkpoint of this step, as only this worker makes it, on frozen tensors that all have in common."""
    folder = paths.step(step)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    entries = {}
    for name in ("model.safetensors", "state.json"):
        data = f"{name} of step {step} by {maker}".encode()
        (folder / name).write_bytes(data)
        entries[name] = FileEntry(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    shared = FileEntry(size=len(FROZEN), sha256=hashlib.sha256(FROZEN).hexdigest())
    paths.shared.mkdir(exist_ok=True)
    paths.blob(shared.sha256).write_bytes(FROZEN)
    paths.best.write_bytes(f"best of {step // 2} by {maker}".encode())
    manifest = {
        "step": step,
        "lease_epoch": 0,
        "files": {name: entry.model_dump() for name, entry in entries.items()},
        "shared": {"frozen.safetensors": shared.model_dump()},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def new_workdir() -> Path:
    """An empty work directory, in memory where there is such a place."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="wmtp-protocol-", dir=memory if memory.is_dir() else None))


def history_of(world: World) -> list[tuple[int, int]]:
    """Step and epoch of what counts, ascending."""
    epochs = read_epochs(world.bucket, world.keys.lease)
    manifests = world.view().manifests
    return [(step, one.epoch) for step, one in sorted(manifests.items()) if counts(epochs, step, one.epoch)]
