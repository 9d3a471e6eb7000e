"""A folder and a URL, for people: what `wmtp sync` checks before the engine works."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from wmtp_worker.errors import InputError, ObjectNotFound, SettingsError
from wmtp_worker.settings import CloudSettings, Settings
from wmtp_worker.storage.cloud import STATE
from wmtp_worker.storage.objects import ObjectStore
from wmtp_worker.storage.open import check_slashes, open_url
from wmtp_worker.storage.transfer import Progress, Transfer
from wmtp_worker.storage.transfer.paths import selector
from wmtp_worker.storage.transfer.plan import listing, walk


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
    for side in (folder, url):
        check_slashes(side)
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
    for side in (source, target):
        check_slashes(side)
    folder, url = (target, source) if is_url(source) else (source, target)
    check_is_there(url)
    return folder_to_push(folder), url


def folder_to_push(folder: str) -> Path:
    """An existing folder. Raises `InputError`."""
    path = Path(folder).expanduser()
    if path.is_file():
        fix = f"name its folder: {path.parent} URL --include {path.name}"
        raise InputError(f"{folder!r} is a file, and no folder", fix=fix)
    if not path.is_dir():
        raise InputError(f"there is no folder {folder!r}", where=str(path.absolute()), fix="check the path")
    return path


def check_is_there(url: str) -> None:
    """Raise `InputError` where a folder that is to be read as a bucket is not there (to write to, it is made)."""
    check_slashes(url)
    folder = url.removeprefix("file://")
    if is_url(folder):
        return
    path = Path(folder).expanduser()
    if path.is_file():
        fix = f"name its folder: {path.parent} --include {path.name}"
        raise InputError(f"{url!r} is a file, and no folder", fix=fix)
    if not path.is_dir():
        raise InputError(f"there is no folder {url!r}", where=str(path.absolute()), fix="check the path")


def check_files(folder: Path, include: Sequence[str], exclude: Sequence[str]) -> None:
    """Raise `InputError` where no file takes part in a push that deletes: all would be deleted on the other side."""
    wanted = selector(include, exclude)
    ours = STATE + "/"
    if next(walk(folder, lambda key: not key.startswith(ours) and wanted(key)), None) is None:
        fix = "check the path and the patterns; to empty the bucket use its provider's tools"
        what = f"the folder {str(folder)!r} has no files that take part, and --delete would empty the bucket"
        raise InputError(what, fix=fix)


def check_objects(
    store: ObjectStore, url: str, cloud: CloudSettings, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> None:
    """Raise `InputError` where no object takes part: most likely the prefix is misspelt, or is an object itself."""
    if next(listing(store.list(), "", selector(include, exclude)), None) is None:
        check_no_object(url, cloud)
        fix = "check the URL; `wmtp sync ls` shows what is there, a part of the URL less at a time"
        raise InputError("there is nothing", where=f"{store.url}/", fix=fix)


def check_no_object(url: str, cloud: CloudSettings, check: Callable[[], None] = lambda: None) -> None:
    """Raise `InputError` where what is taken for a prefix, under which nothing is, is an object."""
    parent, _, name = url.rstrip("/").rpartition("/")
    if not is_url(url) or parent.endswith("/"):
        return  # a folder, or a whole bucket
    store = open_url(parent, cloud, check)
    try:
        store.head(name)
    except (InputError, ObjectNotFound):
        return
    finally:
        store.close()
    raise InputError(f"{name} is an object, and no prefix", where=url, fix=f"write {parent} --include {name}")
