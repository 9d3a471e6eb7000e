"""What the bucket has of one run's checkpoints: one look at all of it, by which everything is decided."""

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePosixPath

from wmtp_worker.errors import IntegrityError, ObjectNotFound, PreconditionFailed, StorageError
from wmtp_worker.storage.layout import MANIFEST, Place, RunKeys, parse_step
from wmtp_worker.storage.lease import Lease
from wmtp_worker.storage.lease_file import counts, read_epochs
from wmtp_worker.storage.objects import ObjectInfo, ObjectStore
from wmtp_worker.storage.seal import FileEntry, Seal
from wmtp_worker.storage.sealed import each, read_seal

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Published:
    """A manifest in the bucket. `seal` is None where it is malformed: `problem` says how."""

    step: int
    version: str
    seal: Seal | None
    data: bytes = b""
    problem: str | None = None

    @property
    def epoch(self) -> int:
        """Who published it; 0 where that cannot be read."""
        return self.seal.lease_epoch if self.seal is not None else 0

    @property
    def owner(self) -> int:
        """The newest epoch that published or claimed it: no older one may change it."""
        return max(self.seal.lease_epoch, self.seal.claimed_by) if self.seal is not None else 0

    @property
    def full(self) -> bool:
        """Whether a run can go on from it exactly."""
        return self.seal is not None and self.seal.kind == "full"


@dataclass(frozen=True)
class View:
    """One look at a run's steps. `objects` has all but the manifests."""

    keys: RunKeys
    objects: Mapping[str, ObjectInfo]
    manifests: Mapping[int, Published]
    epochs: tuple[tuple[int, int], ...]

    @cached_property
    def places(self) -> dict[str, Place]:
        """Whose each object is."""
        return {key: place for key in self.objects if (place := self.keys.place(key)) is not None}

    @cached_property
    def by_step(self) -> dict[int, list[str]]:
        """The objects under each step's folder, manifests left out."""
        found: dict[int, list[str]] = {}
        for key, place in self.places.items():
            if place.step is not None:
                found.setdefault(place.step, []).append(key)
        return found

    @property
    def steps(self) -> list[int]:
        """The steps with a manifest that counts, whether it can be read or not, ascending."""
        return sorted(step for step in self.manifests if self.counts(step))

    def counts(self, step: int) -> bool:
        """Whether this manifest is of the run's history; see `lease_file.counts`. A malformed one is kept in sight."""
        published = self.manifests[step]
        return published.seal is None or counts(self.epochs, step, published.epoch)

    def whole(self, step: int) -> bool:
        """Whether the manifest counts, a run can go on from it, and all it names is there in its size."""
        published = self.manifests[step]
        if published.seal is None or not published.full or not self.counts(step):
            return False
        return self.complete(step, published.seal)

    def complete(self, step: int, seal: Seal) -> bool:
        """Whether all objects of a seal are there, in their sizes."""
        return all(
            key in self.objects and self.objects[key].size == entry.size
            for key, entry in objects_of(self.keys, step, seal).items()
        )

    def named(self) -> set[str]:
        """The keys of all objects that any manifest names, whether it counts or not."""
        return {
            key
            for step, published in self.manifests.items()
            if published.seal is not None
            for key in objects_of(self.keys, step, published.seal)
        }

    def of_step(self, step: int) -> list[str]:
        """The objects under a step's folder, its manifest left out."""
        return self.by_step.get(step, [])


def objects_of(keys: RunKeys, step: int, seal: Seal) -> dict[str, FileEntry]:
    """Key to size and digest of all that a manifest names."""
    epoch = seal.lease_epoch
    return {
        **{keys.file(step, epoch, name): entry for name, entry in seal.files.items()},
        **{keys.blob(epoch, entry.sha256): entry for entry in seal.shared.values()},
        **{beside_key(keys, epoch, name, entry): entry for name, entry in seal.beside.items()},
    }


def beside_key(keys: RunKeys, epoch: int, name: str, entry: FileEntry) -> str:
    """Where a file lies that belongs to a checkpoint but is no part of it, as the best model."""
    return keys.blob(epoch, entry.sha256, PurePosixPath(name).suffix)


def for_the_bucket(manifest: bytes, epoch: int, beside: Mapping[str, FileEntry]) -> bytes:
    """A local manifest as this epoch publishes it."""
    named = {name: entry.model_dump() for name, entry in beside.items()}
    return (json.dumps({**json.loads(manifest), "lease_epoch": epoch, "beside": named}, indent=1) + "\n").encode()


def claimed(manifest: bytes, epoch: int) -> bytes:
    """A manifest of the bucket as this epoch, which goes on from it, holds on to it."""
    return (json.dumps({**json.loads(manifest), "claimed_by": epoch}, indent=1) + "\n").encode()


def for_the_disk(manifest: bytes) -> bytes:
    """A manifest of the bucket without what only the bucket's has."""
    document = json.loads(manifest)
    if not {"beside", "claimed_by"} & document.keys():
        return manifest
    kept = {name: value for name, value in document.items() if name not in ("beside", "claimed_by")}
    return (json.dumps(kept, indent=1) + "\n").encode()


@dataclass
class Catalogue:
    """Looks at one run in the bucket, and changes it only under the lease; without one (None) nobody is kept away."""

    store: ObjectStore
    keys: RunKeys
    lease: Lease | None = None
    # manifests that were read, by key and version; versions of manifests whose objects were found right
    _read: dict[int, Published] = field(default_factory=dict)
    verified: dict[int, str] = field(default_factory=dict)

    @property
    def epoch(self) -> int:
        """Under which what is published here lies; 0 without a lease."""
        return self.lease.epoch if self.lease is not None else 0

    def ensure(self, *, fresh: bool = False) -> None:
        """To be called right before each change: see `Lease.ensure`."""
        if self.lease is not None:
            self.lease.ensure(fresh=fresh)

    def look(self) -> View:
        """One listing, and the manifests that are new or have changed since the last one."""
        objects = {info.key: info for root in self.keys.roots for info in self.store.list(root)}
        versions = {}
        for key in [key for key in objects if key.endswith(f"/{MANIFEST}")]:
            step = parse_step(key.removeprefix(self.keys.prefix).removesuffix(f"/{MANIFEST}"))
            if step is not None:
                versions[step] = objects.pop(key).version
        self._read = {step: found for step, found in self._read.items() if versions.get(step) == found.version}
        self._read |= self._manifests(versions.keys() - self._read.keys())
        epochs = self.lease.epochs if self.lease is not None else read_epochs(self.store, self.keys.lease)
        return View(self.keys, objects, dict(self._read), epochs)

    def _manifests(self, steps: Iterable[int]) -> dict[int, Published]:
        found: dict[int, Published] = {}

        def read(step: int) -> None:
            if (published := self.manifest(step)) is not None:
                found[step] = published

        each(read, sorted(steps))
        return found

    def manifest(self, step: int) -> Published | None:
        """The manifest of a step, None where there is none."""
        try:
            found = read_seal(self.store, self.keys.step(step))
        except IntegrityError as error:
            try:
                version = self.store.head(self.keys.manifest(step)).version
            except ObjectNotFound:
                return None
            return Published(step, version, None, problem=error.what)
        return None if found is None else Published(step, found[1].version, found[0], found[2])

    def verify(self, step: int, published: Published) -> bool:
        """Whether every object of a manifest has the digest that it names, as the store recorded or computes it."""
        if published.seal is None:
            return False
        if self.verified.get(step) == published.version:
            return True
        try:
            for key, entry in objects_of(self.keys, step, published.seal).items():
                info = self.store.head(key)
                if info.size != entry.size or info.sha256 not in (None, entry.sha256):
                    return False
        except ObjectNotFound:
            return False
        self.verified[step] = published.version
        return True

    def delete(self, key: str, *, if_version: str | None = None) -> None:
        """Delete one object, as the holder of the lease. With `if_version`: `PreconditionFailed` if it is another."""
        self.ensure()
        if if_version is None:
            self.store.delete(key)
            return
        # not every server heeds the condition of a DELETE, or knows it: so look right before, too
        try:
            if self.store.head(key).version != if_version:
                raise PreconditionFailed("somebody else changed the object first", where=f"{self.store.url}/{key}")
        except ObjectNotFound:
            return
        try:
            self.store.delete(key, if_version=if_version)
        except StorageError as error:
            if type(error) is not StorageError:
                raise
            self.store.delete(key)
