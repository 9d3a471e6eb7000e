"""Publishing a checkpoint: its files under our epoch, then its manifest by a conditional write, then a last look.

Whatever happens in between, readers see no manifest, the one that was there, or a whole one. A worker that lost its
lease meanwhile writes its files under its own epoch, where they hurt nobody. Its manifest is refused where there is one
of a newer epoch, and not gone on from elsewhere (`lease_file.counts`). `publish` returns only when the lease was still
ours after the manifest was there: then every later worker finds it.
"""

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from wmtp_worker.errors import ObjectNotFound, PreconditionFailed, TransientError
from wmtp_worker.storage.atomic import disk_errors, temporary
from wmtp_worker.storage.layout import MANIFEST, RunPaths
from wmtp_worker.storage.objects import ObjectInfo
from wmtp_worker.storage.published import Catalogue, Published, View, beside_key, claimed, for_the_bucket, objects_of
from wmtp_worker.storage.seal import FileEntry, Seal, file_entry, parse_seal
from wmtp_worker.storage.sealed import each, is_same
from wmtp_worker.storage.transfer import Transfer
from wmtp_worker.storage.transfer.paths import safe_path

log = logging.getLogger(__name__)

_ATTEMPTS = 5
# what is smaller is sent as quickly as it is copied
_WORTH_A_COPY = 1 << 16


@dataclass
class Publisher:
    """Publishes the local checkpoints of one run. One thread at a time."""

    transfer: Transfer
    paths: RunPaths
    catalogue: Catalogue
    _best: tuple[tuple[int, int, int], FileEntry] | None = None  # inode, time and size, and what was in it

    def publish(self, step: int) -> int | None:
        """Publish a local checkpoint, whole or not at all; the bytes of files sent for it, None where it was there.

        With it go the best model and the record of the steps, as they are now. What the bucket has already is copied
        there; a checkpoint that an older epoch published is claimed. Raises `RunHeldError` where another worker has the
        run, `TransientError` where objects vanished or changed meanwhile, `IntegrityError` where a local file is not
        what its manifest says, and the store's errors.
        """
        catalogue, folder = self.catalogue, self.paths.step(step)
        catalogue.ensure()
        manifest = (folder / MANIFEST).read_bytes()
        local = parse_seal(manifest, str(folder))
        view = catalogue.look()
        before = view.manifests.get(step)
        self._check_epoch(before)
        if before is not None and self._is_there(step, local, before, view):
            self._claim(step, before)
            return None
        if before is not None and before.seal is not None and before.epoch == catalogue.epoch:
            # it names the objects that are about to be replaced
            catalogue.delete(catalogue.keys.manifest(step), if_version=before.version)
            before = None
        with self._beside() as beside:
            data = for_the_bucket(manifest, catalogue.epoch, {name: entry for name, (_, entry) in beside.items()})
            seal = parse_seal(data, str(folder))
            sent = self._send(step, seal, view, {name: path for name, (path, _) in beside.items()})
        info = self._put_manifest(step, data, before)
        self._confirm(step, seal, info)
        return sent

    def _check_epoch(self, before: Published | None) -> None:
        """Raise `RunHeldError` where a newer epoch than ours has published or claimed this step."""
        lease = self.catalogue.lease
        if lease is not None and before is not None and before.owner > lease.epoch:
            raise lease.lose()

    def _is_there(self, step: int, local: Seal, before: Published, view: View) -> bool:
        """Whether the bucket has this checkpoint already."""
        if before.seal is None or not view.counts(step) or not before.seal.holds_the_same(local):
            return False
        return view.complete(step, before.seal) and self.catalogue.verify(step, before)

    def _claim(self, step: int, before: Published) -> None:
        """Keep what an older epoch published from all that were taken for dead.

        They know the manifest by its version, and it becomes another: they can neither delete nor replace it, nor
        delete what it names.
        """
        catalogue, key = self.catalogue, self.catalogue.keys.manifest(step)
        if catalogue.lease is None or before.owner == catalogue.epoch or before.seal is None:
            catalogue.ensure(fresh=True)
            return
        catalogue.ensure()
        try:
            info = catalogue.store.put(key, claimed(before.data, catalogue.epoch), if_version=before.version)
        except (PreconditionFailed, ObjectNotFound) as error:
            where = f"{catalogue.store.url}/{key}"
            raise TransientError("somebody else changed the manifest meanwhile", where=where) from error
        self._confirm(step, before.seal, info)

    # --- what is sent ----------------------------------------------------------------------------------------

    @contextmanager
    def _beside(self) -> Iterator[dict[str, tuple[Path, FileEntry]]]:
        """The best model and the record of the steps as they are now, held while they are sent."""
        # not the names under which other threads write the next ones
        links = {path: temporary(path.with_name(f"sent-{path.name}")) for path in (self.paths.best, self.paths.metrics)}
        held: dict[str, tuple[Path, FileEntry]] = {}
        try:
            for path, link in links.items():
                with disk_errors(path.parent), contextlib.suppress(FileNotFoundError):
                    link.unlink(missing_ok=True)
                    if path == self.paths.metrics:
                        shutil.copyfile(path, link)  # it goes on growing
                        held[path.name] = link, file_entry(link)
                    else:
                        _link(path, link)  # it is replaced by a rename
                        held[path.name] = link, self._entry_of_best(link)
            yield held
        finally:
            for link in links.values():
                link.unlink(missing_ok=True)

    def _entry_of_best(self, path: Path) -> FileEntry:
        status = path.stat()
        known = (status.st_ino, status.st_mtime_ns, status.st_size)
        if self._best is None or self._best[0] != known:
            self._best = known, file_entry(path)
        return self._best[1]

    def _send(self, step: int, seal: Seal, view: View, beside: Mapping[str, Path]) -> int:
        """See that all objects of a seal are there; the bytes of those that were neither there, copied nor begun."""
        keys, folder = self.catalogue.keys, self.paths.step(step)
        paths = {keys.file(step, seal.lease_epoch, name): safe_path(folder, name) for name in seal.files}
        paths |= {keys.blob(seal.lease_epoch, one.sha256): self.paths.blob(one.sha256) for one in seal.shared.values()}
        for name, path in beside.items():
            paths[beside_key(keys, seal.lease_epoch, name, seal.beside[name])] = path
        entries, store = objects_of(keys, step, seal), self.catalogue.store
        published, left = self._by_digest(view), self._left(view)
        sent: list[int] = []

        def send(key: str) -> None:
            entry = entries[key]
            if is_same(store, view.objects.get(key), entry):
                return
            if entry.size >= _WORTH_A_COPY:
                place = keys.place(key)
                for source in (published.get(entry.sha256), left.get((place.step, place.name)) if place else None):
                    if source is not None and self._copy(source, key, entry):
                        return
                if (begun := self._begun(entry)) is not None:
                    # parts cannot be moved to another key: finish it where it was begun
                    self.transfer.upload_file(paths[key], begun, sha256=entry.sha256)
                    if self._copy(begun, key, entry):
                        return
            self.transfer.upload_file(paths[key], key, sha256=entry.sha256)
            sent.append(entry.size)

        each(send, entries)
        return sum(sent)

    def _left(self, view: View) -> dict[tuple[int | None, str], str]:
        """Step and name to key of what older epochs have sent, the newest last; perhaps they came no further."""
        places = sorted(view.places.items(), key=lambda item: item[1].epoch)
        return {(place.step, place.name): key for key, place in places if place.epoch < self.catalogue.epoch}

    def _begun(self, entry: FileEntry) -> str | None:
        """The key to which an older epoch began to upload this content from here, and was killed."""
        keys, epoch = self.catalogue.keys, self.catalogue.epoch
        begun = self.transfer.begun(entry.sha256)
        return next((key for key in begun if (place := keys.place(key)) and place.epoch < epoch), None)

    def _by_digest(self, view: View) -> dict[str, str]:
        """Digest to key of what published checkpoints are made of, that of the newest last."""
        return {
            entry.sha256: key
            for step, published in sorted(view.manifests.items())
            if published.seal is not None
            for key, entry in objects_of(view.keys, step, published.seal).items()
            if key in view.objects
        }

    def _copy(self, source: str, key: str, entry: FileEntry) -> bool:
        """Copy within the bucket what is there with the right digest; whether that was so."""
        store = self.catalogue.store
        try:
            info = store.head(source)
            if (info.size, info.sha256) != (entry.size, entry.sha256):
                return False
            store.copy(source, key)
            return is_same(store, store.head(key), entry)
        except (ObjectNotFound, PreconditionFailed):
            return False

    # --- the manifest ----------------------------------------------------------------------------------------

    def _put_manifest(self, step: int, data: bytes, before: Published | None) -> ObjectInfo:
        """Write the manifest where there is none, or over that of an older epoch."""
        catalogue, key = self.catalogue, self.catalogue.keys.manifest(step)
        for _ in range(_ATTEMPTS):
            catalogue.ensure()
            if catalogue.lease is None:
                return catalogue.store.put(key, data)
            try:
                if before is None:
                    return catalogue.store.put(key, data, if_absent=True)
                return catalogue.store.put(key, data, if_version=before.version)
            except (PreconditionFailed, ObjectNotFound):
                # one that was taken for dead wrote it meanwhile: or we are the one
                before = catalogue.manifest(step)
                self._check_epoch(before)
        raise TransientError("the manifest keeps changing", where=f"{catalogue.store.url}/{key}")

    def _confirm(self, step: int, seal: Seal, info: ObjectInfo) -> None:
        catalogue = self.catalogue
        catalogue.ensure(fresh=True)
        view = catalogue.look()
        if not view.complete(step, seal):
            catalogue.delete(catalogue.keys.manifest(step), if_version=info.version)
            raise TransientError(
                "files were removed or changed by somebody else while they were published",
                where=f"{catalogue.store.url}/{catalogue.keys.step(step)}",
                fix="see that one worker alone trains this run",
            )
        catalogue.verified[step] = info.version


def _link(path: Path, link: Path) -> None:
    try:
        os.link(path, link)
    except FileNotFoundError:
        raise
    except OSError:  # not every file system has links
        shutil.copyfile(path, link)
