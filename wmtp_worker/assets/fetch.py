"""The cascade: what is not in the work directory comes from the bucket, else from the hub, and is kept."""

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import tenacity

from wmtp_worker.assets.hub import Repository, Wanted, download
from wmtp_worker.assets.resolve import SAMPLE_DATASET, TOKENIZER_SUFFIX, candidates
from wmtp_worker.errors import ExhaustedError, InputError, Interrupted
from wmtp_worker.settings import Settings
from wmtp_worker.storage.atomic import PARTIAL_PREFIX, disk_errors, fsync_path, publish
from wmtp_worker.storage.layout import AssetKind, asset_dir, asset_name, asset_prefix, is_hub_name
from wmtp_worker.storage.objects import ObjectStore
from wmtp_worker.storage.seal import Seal, seal_folder
from wmtp_worker.storage.sealed import pull_sealed, read_seal
from wmtp_worker.storage.transfer import Progress, Transfer
from wmtp_worker.storage.transfer.locks import file_lock
from wmtp_worker.storage.transfer.progress import LogLines

log = logging.getLogger(__name__)

PUSHING = ".pushing"  # in a bucket's folder: files may be missing yet
_HIDDEN = (".*", ".*/", "*/.*/")  # .git and the like are no part of an asset
_POLL_SECONDS = 0.2
_CLEANED_UP = ("hub", "files")  # ends of the hidden folders made here


@dataclass(frozen=True)
class Fetched:
    """One model, tokenizer or data set that is in the work directory now: `source` is where it came from, a URL."""

    kind: AssetKind
    name: str
    source: str
    folder: Path
    files: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Asset:
    """Something by name: what for, and which setting named it (for messages)."""

    name: str
    wanted: Wanted
    key: str

    @property
    def kind(self) -> AssetKind:
        return "datasets" if self.wanted == "dataset" else "models"

    @property
    def folder(self) -> str | None:
        """The name of its folder, None where `name` is a path."""
        return asset_name(self.name)

    def local(self, workdir: Path) -> Path | None:
        """Where it is now, None where it is not."""
        alone = TOKENIZER_SUFFIX if self.wanted == "tokenizer" else ""
        return next((path for path in candidates(workdir, self.name, self.kind, alone) if os.path.exists(path)), None)

    def published(self, store: ObjectStore) -> str | None:
        """Its address in the bucket, None where nothing is there. Raises `StorageError`."""
        if self.folder is None:
            return None
        prefix = asset_prefix(self.kind, self.folder)
        return None if next(iter(store.list(prefix)), None) is None else f"{store.url}/{prefix}"


def fetch(
    settings: Settings, transfer: Transfer | None, check: Callable[[], None], progress: Progress | None = None
) -> list[Fetched]:
    """Bring models, tokenizer and data set of a run into the work directory, those that are not there yet.

    Several at once. Each is looked for in the bucket (`transfer`; None: there is no bucket), then, by `org/name`, on
    the Hugging Face hub. It appears whole or not at all, and of several processes one fetches it. What is a path, or
    comes with the package, is left alone. `check` is polled and may raise.

    Raises `InputError` where it is nowhere, or the hub does not give it; the bucket's errors, of which an
    `ExhaustedError` is only a warning where the hub has it; `IntegrityError`, `DiskFullError`.
    """
    workdir = settings.run.workdir
    missing = [asset for asset in wanted_assets(settings) if asset.folder is not None and asset.local(workdir) is None]
    if not missing:
        return []
    failed = threading.Event()

    def poll() -> None:
        check()
        if failed.is_set():  # what one of them lacks, the others need not be fetched for
            raise Interrupted("given up, because something else could not be fetched")

    source = Source(transfer, settings.cloud.patience, settings.cloud.allow_http, poll, progress)
    with ThreadPoolExecutor(len(missing), thread_name_prefix="assets") as pool:
        jobs = [pool.submit(source.bring, asset, workdir) for asset in missing]
        for job in as_completed(jobs):
            if job.exception() is not None:
                failed.set()
                job.result()
        return [found for job in jobs if (found := job.result()) is not None]


def wanted_assets(settings: Settings) -> Iterator[Asset]:
    """Every model, tokenizer and data set that the run needs, by name or path, each once; not what is packaged."""
    model, tokenizer, dataset = settings.model.path, settings.model.tokenizer, settings.data.dataset
    weighting = settings.weighting
    models = {"model.path": model}
    if settings.run.stage == "value":
        models["value.backbone"] = settings.value.backbone
    elif weighting.needs_reference:
        models["weighting.reference"] = weighting.reference
    if weighting.needs_reward_model:  # the first stage checks it for the second
        models["weighting.critic.reward_model"] = weighting.critic.reward_model
    by_name = {name: key for key, name in reversed(models.items()) if name is not None}  # one fetch of each
    for name, key in by_name.items():
        yield Asset(name, "model", key)
    if tokenizer is not None and tokenizer not in by_name:
        yield Asset(tokenizer, "tokenizer", "model.tokenizer")
    if dataset != SAMPLE_DATASET:
        yield Asset(dataset, "dataset", "data.dataset")


@dataclass(frozen=True)
class Source:
    """A bucket, if there is one, and the hub. `patience`: seconds for which the hub is asked again in trouble."""

    transfer: Transfer | None
    patience: float
    allow_http: bool
    check: Callable[[], None]
    progress: Progress | None = None

    def bring(self, asset: Asset, workdir: Path) -> Fetched | None:
        """Fetch one asset, unless it is there when its turn has come; None where another process did it meanwhile."""
        folder = asset_dir(workdir, asset.kind, str(asset.folder))
        begun = time.monotonic()
        with file_lock(folder.with_name(f".lock-{folder.name}"), self.check):
            if asset.local(workdir) is not None:
                return None
            found = self._from_bucket(asset, folder) or self._from_hub(asset, folder)
            for end in _CLEANED_UP:
                shutil.rmtree(_partial(found[0], end), ignore_errors=True)
        path, source, seal = found
        done = Fetched(asset.kind, asset.name, source, path, len(seal.files), seal.bytes, time.monotonic() - begun)
        log.info("%s: %.1f MB from %s in %.1f s", asset.name, done.bytes / 1e6, source, done.seconds)
        return done

    def _from_bucket(self, asset: Asset, folder: Path) -> tuple[Path, str, Seal] | None:
        if self.transfer is None:
            return None
        prefix = asset_prefix(asset.kind, folder.name)
        try:
            seal = pull(self.transfer, prefix, folder)
        except ExhaustedError as error:
            if not is_hub_name(asset.name):
                raise
            log.warning("%s: asking the hub, for the bucket cannot be asked: %s", asset.name, error)
            return None
        return None if seal is None else (folder, f"{self.transfer.store.url}/{prefix}", seal)

    def _from_hub(self, asset: Asset, folder: Path) -> tuple[Path, str, Seal]:
        if not is_hub_name(asset.name):
            raise self._nowhere(asset, folder)
        if asset.wanted == "tokenizer":
            folder = folder.with_name(folder.name + TOKENIZER_SUFFIX)
        repository = Repository(asset.name, asset.wanted, self.allow_http)
        progress = self.progress or LogLines(asset.name)
        building = _partial(folder, "hub")
        again = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(ExhaustedError),
            stop=tenacity.stop_after_delay(self.patience),
            wait=tenacity.wait_random_exponential(max=20),
            sleep=self._sleep,
            reraise=True,
        )
        progress.start(None)
        try:
            seal = again(download, repository, building, self.check, progress.advance)
        except InputError:
            shutil.rmtree(building, ignore_errors=True)  # nothing to go on with
            raise
        finally:
            progress.finish()
        _publish(building, folder)
        return folder, repository.url, seal

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.check()
            time.sleep(min(left, _POLL_SECONDS))

    def _nowhere(self, asset: Asset, folder: Path) -> InputError:
        places = [str(folder)]
        if self.transfer is not None:
            places.append(f"{self.transfer.store.url}/{asset_prefix(asset.kind, folder.name)}")
        kind = " --dataset" if asset.kind == "datasets" else ""
        bucket = f"put it into the bucket by `wmtp assets push FOLDER --name {asset.name}{kind}`, or "
        fix = f"{bucket if self.transfer else ''}set {asset.key} to org/name on the Hugging Face hub, or to a path"
        return InputError(f"{asset.key}={asset.name!r} is not there", where=" and ".join(places), fix=fix)


def pull(transfer: Transfer, prefix: str, folder: Path) -> Seal | None:
    """Download a model or data set from the bucket to `folder`, which must not exist; None where the bucket has none.

    Atomic, and checked against the digests of its manifest. A folder that has none (made by other tools) is taken with
    a warning, and sealed with what arrived. Raises `InputError` where a push of it is not finished.
    """
    store = transfer.store
    if read_seal(store, prefix) is not None:
        with disk_errors(folder.parent):
            folder.parent.mkdir(parents=True, exist_ok=True)
        return pull_sealed(transfer, prefix, folder)
    if next(store.list(prefix), None) is None:
        return None
    where = f"{store.url}/{prefix}"
    if next(store.list(prefix + PUSHING), None) is not None:
        raise InputError(
            "it is not all there: a push is under way, or was interrupted",
            where=where,
            fix="wait for it, or repeat `wmtp assets push`",
        )
    log.warning("%s has no recorded digests: only sizes are checked; `wmtp assets push` records them", where)
    building = _partial(folder, "files")
    with disk_errors(folder.parent):
        building.mkdir(parents=True, exist_ok=True)
    transfer.pull(prefix, building, exclude=_HIDDEN, delete=True).raise_for_failures()
    for left in building.glob(".*"):  # the engine's own
        shutil.rmtree(left)
    seal = seal_folder(building)
    for name in seal.files:
        fsync_path(building / name)
    _publish(building, folder)
    return seal


def _partial(folder: Path, end: str) -> Path:
    return folder.with_name(f"{PARTIAL_PREFIX}{folder.name}-{end}")


def _publish(building: Path, folder: Path) -> None:
    with disk_errors(folder.parent):
        fsync_path(building)
        publish(building, folder)
