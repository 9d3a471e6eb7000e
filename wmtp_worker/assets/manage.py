"""What `wmtp assets` does: one work directory, the bucket of the settings if there is one, and the hub."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from wmtp_worker.assets.fetch import Asset, Fetched, Source
from wmtp_worker.assets.hub import Wanted
from wmtp_worker.assets.inventory import Finding, Item, list_assets, verify_bucket, verify_local
from wmtp_worker.assets.publish import Pushed, push
from wmtp_worker.errors import InputError, SettingsError
from wmtp_worker.settings import Settings
from wmtp_worker.storage.cloud import STATE
from wmtp_worker.storage.layout import asset_prefix, is_hub_name
from wmtp_worker.storage.open import open_store
from wmtp_worker.storage.transfer import Progress, Transfer


@dataclass(frozen=True)
class Assets:
    """The models and data sets of one work directory and one bucket (None: there is none)."""

    workdir: Path
    source: Source

    @property
    def transfer(self) -> Transfer | None:
        return self.source.transfer

    def push(self, source: str, wanted: Wanted, name: str | None, replace: bool) -> Pushed:
        """Put a folder, or what a name means, into the bucket; from the hub first where it is not here."""
        if self.transfer is None:
            fix = "set CLOUD_PROVIDER and CLOUD_BUCKET"
            raise SettingsError("there is no bucket to push to", where="cloud.bucket", fix=fix)
        asset = Asset(source, wanted, "SOURCE")
        folder = asset.local(self.workdir)
        if folder is None and is_hub_name(source):
            folder = self._bring(asset, Source(None, *self._rest()))
        if folder is None:
            raise InputError(f"there is no folder {source!r}", where=str(self.workdir), fix="check the path or name")
        if not folder.is_dir():
            raise InputError(f"{source!r} is no folder", where=str(folder), fix="name the folder that holds it")
        return push(self.transfer, folder, asset.kind, name or asset.folder or folder.resolve().name, replace=replace)

    def pull(self, name: str, wanted: Wanted) -> tuple[Path, Fetched | None]:
        """Fetch by name into the work directory; the folder, and None where it was there already."""
        asset = self._named(name, wanted)
        if (folder := asset.local(self.workdir)) is not None:
            return folder, None
        done = self.source.bring(asset, self.workdir)
        return self._found(asset), done

    def verify(self, name: str, wanted: Wanted, read: bool) -> list[Finding]:
        """Both sides of one asset against the recorded digests. Raises `InputError` where no side has it."""
        asset = self._named(name, wanted)
        folder = str(asset.folder)
        findings = [verify_local(asset.local(self.workdir), self.workdir, asset.kind, folder)]
        if self.transfer is not None:
            findings.append(verify_bucket(self.transfer.store, asset.kind, folder, self.source.check, read=read))
        if all(finding.status == "not there" for finding in findings):
            where = " and ".join(finding.place for finding in findings)
            other: Wanted = "model" if wanted == "dataset" else "dataset"
            option = "add --dataset" if other == "dataset" else "leave out --dataset"
            fix = f"there is a {other} of this name: {option}" if self._has(name, other) else "see `wmtp assets ls`"
            raise InputError(f"there is no {wanted} {name!r}", where=where, fix=fix)
        return findings

    def _has(self, name: str, wanted: Wanted) -> bool:
        """Whether either side has something under this name."""
        asset = self._named(name, wanted)
        if asset.local(self.workdir) is not None:
            return True
        prefix = asset_prefix(asset.kind, str(asset.folder))
        return self.transfer is not None and next(self.transfer.store.list(prefix), None) is not None

    def list(self) -> list[Item]:
        """Every asset of both sides."""
        return list_assets(self.workdir, None if self.transfer is None else self.transfer.store)

    def _named(self, name: str, wanted: Wanted) -> Asset:
        asset = Asset(name, wanted, "NAME")
        if asset.folder is None:
            raise InputError(f"{name!r} is no name of a {wanted}", fix="use its name in the bucket, or org/name")
        return asset

    def _bring(self, asset: Asset, source: Source) -> Path:
        source.bring(asset, self.workdir)
        return self._found(asset)

    def _found(self, asset: Asset) -> Path:
        folder = asset.local(self.workdir)
        if folder is None:
            raise InputError(f"{asset.name} was removed while it was fetched", where=str(self.workdir))
        return folder

    def _rest(self) -> tuple[float, bool, Callable[[], None], Progress | None]:
        source = self.source
        return source.patience, source.allow_http, source.check, source.progress


@contextmanager
def open_assets(settings: Settings, check: Callable[[], None], progress: Progress | None = None) -> Iterator[Assets]:
    """The assets of a worker with these settings. Nothing is asked yet."""
    cloud, workdir = settings.cloud, settings.run.workdir
    if cloud.provider == "local" and cloud.bucket is None:
        yield Assets(workdir, Source(None, cloud.patience, cloud.allow_http, check, progress))
        return
    store = open_store(cloud, check)
    try:
        with Transfer(
            store,
            workdir / STATE,
            concurrency=cloud.concurrency,
            memory=cloud.memory << 20,
            bandwidth=cloud.bandwidth * 1e6,
            check=check,
            progress=progress,
        ) as transfer:
            yield Assets(workdir, Source(transfer, cloud.patience, cloud.allow_http, check, progress))
    finally:
        store.close()
