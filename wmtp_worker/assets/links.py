"""Folders of links, as the Hugging Face hub's cache has them, as folders of files."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from wmtp_worker.errors import InputError
from wmtp_worker.storage.atomic import TEMPORARY_PREFIX
from wmtp_worker.storage.transfer.locks import try_lock

_PREFIX = f"{TEMPORARY_PREFIX}push-"
_LOCK = ".lock"


@contextmanager
def own_files(folder: Path) -> Iterator[Path]:
    """The folder itself if its files are its own, else a temporary one beside it with the files its links lead to.

    These are hard links: nothing is copied, and nothing is written into the folder. Hidden files are left out. What a
    killed process left of them is removed by the next one. Raises `InputError` for links that lead to no file, and
    where no hard links can be made.
    """
    _sweep(folder.parent)
    paths = [path for path in folder.rglob("*") if not _hidden(path.relative_to(folder))]
    links = [path for path in paths if path.is_symlink()]
    if not links:
        yield folder
        return
    for link in links:
        if not link.is_file():
            fix = "put the file there, or remove the link"
            raise InputError(f"{link.name} is a link that leads to no file", where=str(link), fix=fix)
    with _temporary(folder) as own:
        _link_all(folder, paths, own)
        yield own


@contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    """A hidden folder beside it, locked as long as it is in use."""
    while True:
        try:
            own = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder.parent))
        except OSError as error:
            raise _cannot(folder, error) from error
        with try_lock(own / _LOCK) as held:
            if not held:
                continue  # somebody took it for what a killed process left
            try:
                yield own
            finally:
                shutil.rmtree(own, ignore_errors=True)
            return


def _sweep(parent: Path) -> None:
    for left in parent.glob(f"{_PREFIX}*"):
        # somebody else's stays
        with suppress(InputError), try_lock(left / _LOCK) as free:
            if free:
                shutil.rmtree(left, ignore_errors=True)


def _link_all(folder: Path, paths: list[Path], own: Path) -> None:
    try:
        for path in paths:
            if path.is_file():
                place = own / path.relative_to(folder)
                place.parent.mkdir(parents=True, exist_ok=True)
                os.link(os.path.realpath(path), place)
    except OSError as error:
        raise _cannot(folder, error) from error


def _cannot(folder: Path, error: OSError) -> InputError:
    what = f"its files are links, which cannot be followed beside it: {error.strerror}"
    return InputError(what, where=str(folder), fix=f"copy it (cp -rL {folder} COPY) and push the copy")


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
