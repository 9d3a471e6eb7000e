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

import contextlib
import logging
import shutil
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from wmtp_worker.errors import InputError, IntegrityError, ObjectNotFound
from wmtp_worker.storage.atomic import PARTIAL_PREFIX, SET_ASIDE_PREFIX, set_aside
from wmtp_worker.storage.layout import MANIFEST, RunPaths, parse_step
from wmtp_worker.storage.objects import ObjectInfo
from wmtp_worker.storage.seal import verify_folder
from wmtp_worker.storage.sealed import is_complete, pull_sealed, push_sealed, read_seal
from wmtp_worker.storage.transfer import Report, Transfer

log = logging.getLogger(__name__)

# a large file takes hours on a slow line; what is older belongs to no live worker
_ABANDONED = timedelta(days=3)


class RunSync:
    """The checkpoints, exports and logs of one run, carried between a work directory and a bucket."""

    def __init__(self, transfer: Transfer, paths: RunPaths) -> None:
        self.transfer = transfer
        self.store = transfer.store
        self.paths = paths
        self.prefix = paths.key(paths.checkpoints)

    def published_steps(self) -> list[int]:
        """The steps that have a manifest in the bucket, ascending."""
        return sorted(step for step, objects in self._steps().items() if self._manifest(step) in objects)

    def fetch_checkpoint(
        self, resume: str | int, accept: Callable[[bytes, str], object] = lambda manifest, folder: None
    ) -> int | None:
        """Put the checkpoint to resume from into the work directory, if the bucket has it and the disk does not.

        The logs and the best model that belong to one that is newer than all here come just before it: once it is
        there, all of the run is. `accept` sees a manifest and its folder's name, and raises `IntegrityError` where they
        make no checkpoint. Returns the step, None where there was nothing to fetch. One that does not verify is passed
        over with a warning. Raises the store's errors, and `IntegrityError` where a step that was asked for is damaged.
        """
        if resume == "never":
            return None
        remote, local = self.published_steps(), self.paths.steps()
        wanted = [resume] if isinstance(resume, int) else sorted({*remote, *local}, reverse=True)
        fetched = None
        for step in wanted:
            if step in local and self._verifies(step, accept, also_remote=step in remote):
                break
            if step in remote and self._fetch(step, accept, must=isinstance(resume, int), newest=step == remote[-1]):
                fetched = step
                break
        self._drop_beginnings()
        return fetched

    def _verifies(self, step: int, accept: Callable[[bytes, str], object], also_remote: bool) -> bool:
        folder = self.paths.step(step)
        try:
            verify_folder(folder)
            accept((folder / MANIFEST).read_bytes(), folder.name)
        except (IntegrityError, ObjectNotFound, InputError) as error:
            if also_remote:
                log.warning("%s does not verify, taking the bucket's: %s", folder, error.what)
                set_aside(self.paths.checkpoints, [folder])
            return False
        return True

    def _fetch(self, step: int, accept: Callable[[bytes, str], object], must: bool, newest: bool) -> bool:
        folder = self.paths.step(step)

        def companions() -> None:
            if step <= max(self.paths.steps(), default=-1):
                return  # what is here is as new
            self.fetch_logs()
            # where somebody goes back, the best model may be of what comes after
            if newest or not must:
                self.fetch_file(self.paths.best)

        try:
            pull_sealed(
                self.transfer,
                self.paths.key(folder),
                folder,
                accept=lambda manifest: accept(manifest, folder.name),
                before=companions,
            )
        except (IntegrityError, ObjectNotFound) as error:
            if must:
                raise
            log.warning("passed over step_%d in the bucket: %s", step, error)
            return False
        return True

    def _drop_beginnings(self) -> None:
        """Remove beginnings of downloads that nobody goes on with."""
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
        _warn(self.transfer.pull(self.paths.key(self.paths.logs), self.paths.logs), "fetched")

    def publish(self, step: int, replace: bool) -> bool:
        """Publish a local checkpoint, whole or not at all; see `sealed.push_sealed`."""
        return push_sealed(self.transfer, self.paths.step(step), self.paths.key(self.paths.step(step)), replace=replace)

    def publish_file(self, path: Path) -> None:
        """Upload one file of the run's checkpoint folder, unless the bucket has the same."""
        self.transfer.push(self.paths.checkpoints, self.prefix, include=[f"/{path.name}"]).raise_for_failures()

    def publish_logs(self) -> None:
        """Upload what is new in the run's logs; one that cannot be sent is left out with a warning."""
        _warn(self.transfer.push(self.paths.logs, self.paths.key(self.paths.logs)), "uploaded")

    def prune(self, keep_last: int, newest: int) -> list[int]:
        """Delete all but the last `keep_last` whole published steps up to `newest`, and half-sent ones of long ago.

        The manifest goes first: a crash leaves no checkpoint that only looks whole. Returns the published ones deleted.
        """
        steps = {step: objects for step, objects in self._steps().items() if step <= newest}
        published = [step for step, objects in steps.items() if self._manifest(step) in objects]
        whole = sorted(step for step in published if self._whole(step, steps[step]))
        # those that are not whole take nobody's place, and go with the ones around them
        doomed = [step for step in sorted(published) if len(whole) >= keep_last and step < whole[-keep_last]]
        for step, objects in steps.items():
            if step in doomed or (step not in published and _is_old(objects)):
                self._delete(step, objects)
        self.store.sweep(self.prefix, _ABANDONED)
        return doomed

    def set_aside_after(self, step: int) -> list[int]:
        """Move published steps after `step` to `set-aside-<UTC time>/` in the bucket, where nothing looks for them.

        The exports go with them, and a copy of the logs: they tell of what was set aside.
        """
        later = {number: objects for number, objects in self._steps().items() if number > step}
        if not later:
            return []
        aside = f"{self.prefix}{SET_ASIDE_PREFIX}{datetime.now(UTC):%Y%m%dT%H%M%S}/"
        logs = self.paths.key(self.paths.logs)
        for info in self.store.list(logs):
            self.store.copy(info.key, f"{aside}logs/{info.key.removeprefix(logs)}")
        for path in (self.paths.best, self.paths.final):
            with contextlib.suppress(ObjectNotFound):
                self.store.copy(self.paths.key(path), aside + path.name)
                self.store.delete(self.paths.key(path))
        for number, objects in later.items():
            if self._manifest(number) in objects:
                for key in sorted(objects, key=lambda key: key.endswith(f"/{MANIFEST}")):
                    self.store.copy(key, aside + key.removeprefix(self.prefix))
            self._delete(number, objects)
        return sorted(later)

    def _steps(self) -> dict[int, dict[str, ObjectInfo]]:
        """Every object under a step's folder in the bucket, by step and key; no markers of empty folders."""
        found: dict[int, dict[str, ObjectInfo]] = defaultdict(dict)
        for info in self.store.list(self.prefix):
            folder, _, name = info.key.removeprefix(self.prefix).partition("/")
            if name and not name.endswith("/") and (step := parse_step(folder)) is not None:
                found[step][info.key] = info
        return found

    def _whole(self, step: int, objects: dict[str, ObjectInfo]) -> bool:
        prefix = self.paths.key(self.paths.step(step))
        try:
            published = read_seal(self.store, prefix)
        except IntegrityError:
            return False
        return published is not None and is_complete(published[0], objects, prefix)

    def _manifest(self, step: int) -> str:
        return self.paths.key(self.paths.step(step)) + MANIFEST

    def _delete(self, step: int, objects: dict[str, ObjectInfo]) -> None:
        manifest = self._manifest(step)
        for key in sorted(objects, key=lambda key: key != manifest):
            self.store.delete(key)


def _is_old(objects: dict[str, ObjectInfo]) -> bool:
    """Whether nobody is sending these any more."""
    limit = datetime.now(UTC) - _ABANDONED
    return all(info.modified is not None and info.modified < limit for info in objects.values())


def _warn(report: Report, what: str) -> None:
    for key, error in report.failed:
        log.warning("the log %r is not %s: %s", key, what, error.what)
