"""A folder and a URL, for people: what `wmtp sync` checks before the engine works."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from wmtp_worker.errors import InputError, SettingsError
from wmtp_worker.settings import Settings
from wmtp_worker.storage.cloud import STATE
from wmtp_worker.storage.objects import ObjectStore
from wmtp_worker.storage.open import open_url
from wmtp_worker.storage.transfer import Progress, Transfer


@contextmanager
def open_transfer(
    url: str, settings: Settings, check: Callable[[], None], progress: Progress | None = None
) -> Iterator[Transfer]:
    """An engine on the bucket (or the part of one) that a URL names, with the limits of `settings.cloud`."""
    cloud = settings.cloud
    store = open_url(url, cloud, check)
    try:
        with Transfer(
            store,
            settings.run.workdir / STATE,
            concurrency=cloud.concurrency,
            memory=cloud.memory << 20,
            bandwidth=cloud.bandwidth * 1e6,
            check=check,
            progress=progress,
        ) as transfer:
            yield transfer
    finally:
        store.close()


def is_url(text: str) -> bool:
    return "://" in text


def check_sides(folder: str, url: str, way: Literal["push", "pull"]) -> None:
    """Raise `SettingsError` where the folder is a URL: the two were probably given the wrong way round."""
    if is_url(folder):
        other = "" if is_url(url) else f"; `wmtp sync {'pull' if way == 'push' else 'push'}` goes the other way"
        told = "FOLDER URL" if way == "push" else "URL FOLDER"
        raise SettingsError(f"{folder!r} is a URL, and no folder", fix=f"write wmtp sync {way} {told}{other}")


def folder_and_url(source: str, target: str) -> tuple[Path, str]:
    """Which of the two is the folder, which the bucket; of two folders the second is taken for a bucket.

    Raises `SettingsError` where both are URLs, `InputError` where the folder is none.
    """
    if is_url(source) and is_url(target):
        raise SettingsError("both are URLs", fix="name a folder on this machine as one of the two")
    folder, url = (target, source) if is_url(source) else (source, target)
    check_is_there(url)
    return folder_to_push(folder, delete=False), url


def folder_to_push(folder: str, delete: bool) -> Path:
    """An existing folder. Raises `InputError`, also where it is empty and all of the bucket would be deleted."""
    path = Path(folder).expanduser()
    if path.is_file():
        fix = f"name its folder: {path.parent} URL --include {path.name}"
        raise InputError(f"{folder!r} is a file, and no folder", fix=fix)
    if not path.is_dir():
        raise InputError(f"there is no folder {folder!r}", where=str(path.absolute()), fix="check the path")
    if delete and next(path.iterdir(), None) is None:
        fix = "check the path; to empty the bucket use its provider's tools"
        raise InputError(f"the folder {folder!r} is empty, and --delete would empty the bucket", fix=fix)
    return path


def check_is_there(url: str) -> None:
    """Raise `InputError` where a folder that is to be read as a bucket is not there (to write to, it is made)."""
    if not is_url(url) and not Path(url).expanduser().is_dir():
        raise InputError(f"there is no folder {url!r}", where=str(Path(url).absolute()), fix="check the path")


def check_not_empty(store: ObjectStore) -> None:
    """Raise `InputError` where nothing is there: most likely the prefix is misspelt."""
    if next(iter(store.list()), None) is None:
        fix = "check the URL; `wmtp sync ls` shows what is there, a part of the URL less at a time"
        raise InputError("there is nothing", where=f"{store.url}/", fix=fix)
