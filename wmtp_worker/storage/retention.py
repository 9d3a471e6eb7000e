"""What goes from the bucket, and when: old checkpoints, what crashed workers left, what a run goes back behind.

All of it is done by the holder of the lease alone, which is asked for before each deletion, and only to what its own
and older epochs have made. A manifest goes before the objects it names, by its version: a crash leaves garbage, and
nothing that only looks whole.
"""

import contextlib
import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from wmtp_worker.errors import ObjectNotFound, PreconditionFailed
from wmtp_worker.storage.atomic import SET_ASIDE_PREFIX
from wmtp_worker.storage.layout import RunPaths, step_name
from wmtp_worker.storage.objects import ObjectInfo
from wmtp_worker.storage.published import Catalogue, Published, View, objects_of

log = logging.getLogger(__name__)

# without a lease: a large file takes hours on a slow line; what is older belongs to no live worker
_ABANDONED = timedelta(days=3)
# with one: nobody but us has a right to send anything, and we are not sending
_STALE = timedelta(hours=1)
_MOST = 1000  # objects that one sweep removes


@dataclass
class Retention:
    """Deletes and moves what a run has in the bucket. One thread at a time, and nothing is being published by it."""

    paths: RunPaths
    catalogue: Catalogue
    check: Callable[[], None] = lambda: None  # polled between deletions; may raise

    def prune(self, keep_last: int, newest: int, keep_every: int = 0) -> list[int]:
        """Delete old checkpoints up to step `newest`, the one just published; returns their steps.

        Of the whole ones the last `keep_last` stay, and multiples of `keep_every` (0: none); and the newest whose
        objects all have the digests that its manifest names. Ones that are not whole take nobody's place, and go with
        the ones around them. What nobody names any more goes after them.
        """
        view = self.catalogue.look()
        ours = [step for step in sorted(view.manifests) if step <= newest and self._may(view.manifests[step])]
        whole = [step for step in ours if view.whole(step)]
        verified = self._newest_verified(view)
        if verified is None or len(whole) < keep_last:
            doomed = []
        else:
            doomed = [
                step
                for step in ours
                if step < whole[-keep_last]
                and step != verified
                and not (keep_every and step % keep_every == 0 and step in whole)
            ]
        gone = [step for step in doomed if self._drop_manifest(step, view.manifests[step])]
        left = replace(view, manifests={step: one for step, one in view.manifests.items() if step not in gone})
        # theirs first: whatever ends this here, the rest is garbage for the next sweep
        theirs = {key for step in gone for key in view.of_step(step)} | (view.named() - left.named())
        self._remove((key for key in theirs if key in view.objects), "pruned")
        self._remove((key for key in self._garbage(left, newest) if key not in theirs), "removed left over")
        self.catalogue.store.sweep(self.catalogue.keys.prefix, self._patience)
        return gone

    def sweep(self) -> int:
        """Remove what older epochs left that never became a checkpoint, a bounded number; returns how many objects.

        A checkpoint that is damaged stays for inspection.
        """
        view = self.catalogue.look()
        removed = self._remove(self._garbage(view, newest=-1), "swept what crashed workers left in the bucket:")
        probes = self.catalogue.store.list(self.catalogue.keys.probes)
        removed += self._remove((info.key for info in probes if _is_older(info, _STALE)), "swept probes:")
        self.catalogue.store.sweep(self.catalogue.keys.prefix, self._patience)
        return removed

    def set_aside_after(self, step: int) -> list[int]:
        """Move published steps after `step` to `set-aside-<UTC time>/` in the bucket, where nothing looks for them.

        The exports go with them, and a copy of the logs: they tell of what was set aside. Returns the steps.
        """
        catalogue = self.catalogue
        keys, store = catalogue.keys, catalogue.store
        view = catalogue.look()
        later = [number for number in sorted(view.manifests) if number > step]
        if not later:
            return []
        copied: set[str] = set()  # several manifests name the same shared tensors

        def copy(key: str, target: str) -> None:
            if key not in copied:
                self.check()
                with contextlib.suppress(ObjectNotFound):
                    store.copy(key, target)
                copied.add(key)

        aside = f"{keys.prefix}{SET_ASIDE_PREFIX}{datetime.now(UTC):%Y%m%dT%H%M%S}/"
        catalogue.ensure()
        logs = self.paths.key(self.paths.logs)
        for info in store.list(logs):
            copy(info.key, f"{aside}logs/{info.key.removeprefix(logs)}")
        for path in (self.paths.best, self.paths.final):
            copy(self.paths.key(path), aside + path.name)
            catalogue.delete(self.paths.key(path))
        for number in later:
            published = view.manifests[number]
            named = objects_of(keys, number, published.seal) if published.seal is not None else ()
            # the manifest last, as always
            for key in [
                *(key for key in {*named, *view.of_step(number)} if key in view.objects),
                keys.manifest(number),
            ]:
                copy(key, aside + key.removeprefix(keys.prefix))
            if self._drop_manifest(number, published):
                self._remove(view.of_step(number), "set aside")
        return later

    # --- what may go -----------------------------------------------------------------------------------------

    @property
    def _patience(self) -> timedelta:
        return _ABANDONED if self.catalogue.lease is None else _STALE

    def _may(self, published: Published) -> bool:
        """Whether a manifest is ours or an older epoch's; without a lease all are."""
        return self.catalogue.lease is None or published.owner <= self.catalogue.epoch

    def _newest_verified(self, view: View) -> int | None:
        """The newest step that a resume would find right."""
        for step in sorted(view.manifests, reverse=True):
            if view.whole(step) and self.catalogue.verify(step, view.manifests[step]):
                return step
        return None

    def _garbage(self, view: View, newest: int) -> Iterator[str]:
        """Objects that no manifest names, of older epochs and, up to step `newest`, of ours: more may be on its way."""
        named = view.named()
        unreadable = {step for step, one in view.manifests.items() if one.seal is None}
        epoch, lease = self.catalogue.epoch, self.catalogue.lease
        for key, place in view.places.items():
            if key in named or place.step in unreadable or (place.step is None and unreadable):
                continue
            past = newest >= 0 if place.step is None else place.step <= newest
            if lease is None:
                # who knows whose these are
                doomed = _is_older(view.objects[key], _ABANDONED) or (past and place.step in view.manifests)
            else:
                doomed = place.epoch < epoch or (place.epoch == epoch and past)
            if doomed:
                yield key

    # --- how it goes -----------------------------------------------------------------------------------------

    def _drop_manifest(self, step: int, published: Published) -> bool:
        """Delete a manifest, unless it is another one by now; whether it is gone."""
        self.check()
        try:
            self.catalogue.delete(self.catalogue.keys.manifest(step), if_version=published.version)
        except PreconditionFailed:
            log.info("%s was published anew: it stays", step_name(step))
            return False
        self.catalogue.verified.pop(step, None)
        return True

    def _remove(self, keys: Iterable[str], what: str) -> int:
        doomed: Collection[str] = sorted(keys)[:_MOST]
        for key in doomed:
            self.check()
            self.catalogue.delete(key)
        if doomed:
            log.info("%s %d objects", what, len(doomed))
        return len(doomed)


def _is_older(info: ObjectInfo, age: timedelta) -> bool:
    return info.modified is not None and info.modified < datetime.now(UTC) - age
