"""One run in the bucket and in the work directory: which checkpoint to go on from, what to publish, what to drop.

local            bucket           what happens
---------------  ---------------  ----------------------------------------------------------------
none             none             nothing to fetch: a fresh start
step 40          none             nothing to fetch; step 40 is published (catching up)
none             step 40          step 40 is fetched
step 40          step 60          step 60 is fetched: the newest that verifies wins
step 60          step 40          nothing to fetch; step 60 is published
step 40          step 40          nothing to fetch: the local one is as good, and nearer
step 60 damaged  step 60          step 60 is fetched, the damaged one set aside
step 40          step 60 damaged  nothing to fetch; step 60 is passed over, loudly
"""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wmtp_worker.errors import InputError, IntegrityError, ObjectNotFound, StorageError
from wmtp_worker.storage.atomic import PARTIAL_PREFIX, disk_errors, set_aside
from wmtp_worker.storage.layout import MANIFEST, RunPaths
from wmtp_worker.storage.lease import Lease
from wmtp_worker.storage.publish import Publisher
from wmtp_worker.storage.published import Catalogue, Published, beside_key, for_the_disk
from wmtp_worker.storage.retention import Retention
from wmtp_worker.storage.seal import Seal, file_entry, verify_folder
from wmtp_worker.storage.sealed import check_room, fetch_files, fetch_folder, is_same
from wmtp_worker.storage.transfer import Report, Transfer

log = logging.getLogger(__name__)

Accept = Callable[[bytes, str], object]
_LARGEST_HEARTBEAT = 1 << 20


class RunSync:
    """The checkpoints, exports and logs of one run, carried between a work directory and a bucket.

    Reading needs no lease. What is published, deleted or moved without one is epoch 0's, and nobody is kept from doing
    the same at the same time.
    """

    def __init__(
        self,
        transfer: Transfer,
        paths: RunPaths,
        lease: Lease | None = None,
        check: Callable[[], None] = lambda: None,
        logs: bool = True,
    ) -> None:
        """`check` is polled between deletions, which may be many, and may raise. Without `logs` none are published."""
        self.transfer = transfer
        self.store = transfer.store
        self.paths = paths
        self.keys = paths.keys
        self.logs = logs
        self.catalogue = Catalogue(self.store, self.keys, lease)
        self._publisher = Publisher(transfer, paths, self.catalogue)
        self._retention = Retention(paths, self.catalogue, check)

    def hold(self, lease: Lease) -> None:
        """Do from now on everything under this lease."""
        self.catalogue.lease = lease

    def published_steps(self) -> list[int]:
        """The steps in the bucket that a run might go on from, by their manifests, ascending."""
        view = self.catalogue.look()
        return [step for step in view.steps if view.manifests[step].seal is None or view.manifests[step].full]

    def whole_steps(self) -> list[int]:
        """Those of them whose objects are all there, as the manifest and the store tell, ascending."""
        view = self.catalogue.look()
        return [step for step in view.steps if view.whole(step) and self.catalogue.verify(step, view.manifests[step])]

    # --- from the bucket -------------------------------------------------------------------------------------

    def fetch_checkpoint(self, resume: str | int, accept: Accept = lambda manifest, folder: None) -> int | None:
        """Put the checkpoint to resume from into the work directory, if the bucket has it and the disk does not.

        The logs and the best model that belong to one that is newer than all here come just before it: once it is
        there, all of the run is. `accept` sees a manifest and its folder's name, and raises `IntegrityError` where they
        make no checkpoint. Returns the step, None where there was nothing to fetch. One that does not verify is passed
        over with a warning; one with nothing but weights is taken only if its step is asked for. Raises the store's
        errors, and `IntegrityError` where a step that was asked for is damaged.
        """
        if resume == "never":
            return None
        view, local = self.catalogue.look(), self.paths.steps()
        must = isinstance(resume, int)
        remote = {step: view.manifests[step] for step in view.steps}
        if not must:
            remote = {step: one for step, one in remote.items() if one.full or one.seal is None}
        wanted = [resume] if isinstance(resume, int) else sorted({*remote, *local}, reverse=True)
        fetched = None
        for step in wanted:
            if step in local and self._verifies(step, accept, must, also_remote=step in remote):
                break
            if step in remote and self._fetch(remote[step], accept, must, newest=step == max(remote)):
                fetched = step
                break
        return fetched

    def _verifies(self, step: int, accept: Accept, must: bool, also_remote: bool) -> bool:
        """Whether the local checkpoint is what is wanted; if not, and the bucket has another, it is set aside."""
        folder = self.paths.step(step)
        try:
            seal = verify_folder(folder)
            accept((folder / MANIFEST).read_bytes(), folder.name)
            if must or seal.kind == "full":
                return True
            reason = "has no more than weights"
        except (IntegrityError, ObjectNotFound, InputError) as error:
            reason = f"does not verify: {error.what}"
        if also_remote:
            log.warning("taking the bucket's: %s %s", folder, reason)
            set_aside(self.paths.checkpoints, [folder])
        return False

    def _fetch(self, published: Published, accept: Accept, must: bool, newest: bool) -> bool:
        folder = self.paths.step(published.step)
        where = f"{self.store.url}/{self.keys.step(published.step)}"
        try:
            if published.seal is None:
                raise IntegrityError(published.problem or "the manifest is malformed", where=where)
            seal, manifest = published.seal, for_the_disk(published.data)
            accept(manifest, folder.name)
            self._fetch_shared(seal)
            keys = {name: self.keys.file(published.step, seal.lease_epoch, name) for name in seal.files}

            def companions() -> None:
                if published.step > max(self.paths.steps(), default=-1):  # else what is here is as new
                    # where somebody goes back, the best model may be of what comes after
                    self._fetch_companions(seal, best_too=newest or not must)

            fetch_folder(self.transfer, keys, seal, manifest, folder, companions)
        except (IntegrityError, ObjectNotFound) as error:
            if must:
                raise
            log.warning("passed over step_%d in the bucket: %s", published.step, error)
            return False
        return True

    def _fetch_shared(self, seal: Seal) -> None:
        """Download the frozen tensors that are not here yet, or are damaged here: those are set aside."""
        entries = {self.paths.blob(entry.sha256): entry for entry in seal.shared.values()}
        missing = {path: entry for path, entry in entries.items() if not path.exists() or file_entry(path) != entry}
        if damaged := [path for path in missing if path.exists()]:
            log.warning("taking the bucket's: %s do not verify", ", ".join(map(str, damaged)))
            set_aside(self.paths.checkpoints, damaged)
        if not missing:
            return
        with disk_errors(self.paths.shared):
            self.paths.shared.mkdir(parents=True, exist_ok=True)
        check_room(self.paths.shared, sum(entry.size for entry in missing.values()))
        keys = {path: (self.keys.blob(seal.lease_epoch, entry.sha256), entry) for path, entry in missing.items()}
        fetch_files(self.transfer, keys)

    def _fetch_companions(self, seal: Seal, best_too: bool) -> None:
        self.fetch_logs()
        known = {path.name: path for path in (self.paths.best, self.paths.metrics)}
        beside = {name: entry for name, entry in seal.beside.items() if name in known}
        # those under plain names may be of a worker that was taken for dead; these are the manifest's own
        fetch_files(
            self.transfer,
            {known[name]: (beside_key(self.keys, seal.lease_epoch, name, one), one) for name, one in beside.items()},
        )
        if not seal.beside and best_too:
            self.fetch_file(self.paths.best)

    def drop_beginnings(self) -> None:
        """Remove beginnings of downloads that nobody goes on with. For who holds the run's local lock."""
        for beginning in self.paths.checkpoints.glob(f"{PARTIAL_PREFIX}step_*"):
            shutil.rmtree(beginning, ignore_errors=True)

    def fetch_file(self, path: Path) -> bool:
        """Download one file of the run to its place, unless the bucket has none; returns whether it has."""
        try:
            self.transfer.download_file(self.paths.key(path), path)
        except ObjectNotFound:
            return False
        return True

    def fetch_logs(self) -> None:
        """Download the run's logs, in place of the local ones; one that cannot be had is left out with a warning."""
        for folder in (self.paths.logs, self.paths.tracking):
            _warn(self.transfer.pull(self.paths.key(folder), folder), "fetched")

    def read_heartbeat(self) -> dict[str, Any] | None:
        """What the last worker said of itself in `heartbeat.json`; None where that cannot be understood."""
        try:
            _, data = self.store.get(self.keys.heartbeat, 0, _LARGEST_HEARTBEAT)
            document = json.loads(bytes(data))
        except (ObjectNotFound, ValueError, RecursionError):
            return None
        return document if isinstance(document, dict) else None

    # --- to the bucket ---------------------------------------------------------------------------------------

    def publish(self, step: int) -> int | None:
        """Publish a local checkpoint, whole or not at all; bytes sent, None where it was there. See `Publisher`."""
        sent = self._publisher.publish(step)
        try:
            self._show_best(step)
        except StorageError as error:  # its content is in the bucket, under the name that the manifest knows
            log.warning("the best model is not under its plain name in the bucket: %s", error)
        return sent

    def _show_best(self, step: int) -> None:
        """Let people find the best model that went with a checkpoint under its plain name, too."""
        published, plain = self.catalogue.manifest(step), self.paths.key(self.paths.best)
        entry = published.seal.beside.get(self.paths.best.name) if published and published.seal else None
        if published is None or entry is None:
            return
        try:
            info = self.store.head(plain)
        except ObjectNotFound:
            info = None
        if not is_same(self.store, info, entry):
            self.catalogue.ensure()
            self.store.copy(beside_key(self.keys, published.epoch, self.paths.best.name, entry), plain)

    def publish_file(self, path: Path) -> None:
        """Upload one file of the run's checkpoint folder, unless the bucket has the same."""
        self.catalogue.ensure()
        self.transfer.push(self.paths.checkpoints, self.keys.prefix, include=[f"/{path.name}"]).raise_for_failures()

    def publish_logs(self) -> None:
        """Upload what is new in the run's logs; one that cannot be sent is left out with a warning."""
        self.catalogue.ensure()
        for folder in (self.paths.logs, self.paths.tracking) if self.logs else ():
            if folder.is_dir():
                _warn(self.transfer.push(folder, self.paths.key(folder)), "uploaded")

    def prune(self, keep_last: int, newest: int, keep_every: int = 0) -> list[int]:
        """Delete old checkpoints from the bucket; see `retention.Retention`."""
        return self._retention.prune(keep_last, newest, keep_every)

    def sweep(self) -> int:
        """Remove what crashed workers left in the bucket; see `retention.Retention`."""
        return self._retention.sweep()

    def set_aside_after(self, step: int) -> list[int]:
        """Go on from `step`, and move later checkpoints in the bucket out of the way; see `retention.Retention`.

        The order matters. The one to go on from becomes ours: a worker that was taken for dead may not delete it any
        more. Then the lease tells of it (`Lease.began`): later ones do not count. Only then are they moved: whoever
        takes over meanwhile goes on from none of them. What is not done after an error, the next call does.
        """
        if (self.paths.step(step) / MANIFEST).exists():
            self._publisher.publish(step)
        if self.catalogue.lease is not None:
            self.catalogue.lease.began(step)
        return self._retention.set_aside_after(step)


def _warn(report: Report, what: str) -> None:
    for key, error in report.failed:
        log.warning("the log %r is not %s: %s", key, what, error.what)
