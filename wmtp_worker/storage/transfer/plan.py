"""What differs between a folder and a prefix: both sides sorted the same way and merged, in flat memory."""

import logging
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from wmtp_worker.errors import StorageError
from wmtp_worker.storage.objects import ObjectInfo
from wmtp_worker.storage.transfer.journal import Stamp
from wmtp_worker.storage.transfer.paths import is_hidden, reading

LOG = logging.getLogger(__name__)
Wanted = Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class Local:
    """A regular file; `key` is its path relative to the folder, with `/`."""

    key: str
    name: str  # the whole path, as text: a `Path` costs more than all else in the plan
    stamp: Stamp

    @property
    def path(self) -> Path:
        """The whole path."""
        return Path(self.name)


@dataclass(frozen=True, slots=True)
class Pair:
    """One key and what is there on each side."""

    key: str
    local: Local | None
    remote: ObjectInfo | None


def walk(folder: Path, wanted: Wanted, avoid: Path | None = None) -> Iterator[Local]:
    """Every file below `folder`, ascending by the UTF-8 bytes of its key. Memory: the names of one folder a level.

    Left out: temporaries, locks, everything in `avoid`, what is no regular file. Links to files below the folder are
    followed; other links are skipped with a warning. No folder there: nothing. Raises `InputError` where it cannot be
    read.
    """
    with reading(folder):
        try:
            root = folder.resolve(strict=True)
        except FileNotFoundError:
            return
        avoided = avoid.resolve() if avoid else None
    base = f"{folder}/".replace("//", "/")
    pending = [_names(base)]
    prefixes = [""]
    while pending:
        name = next(pending[-1], None)
        if name is None:
            pending.pop()
            prefixes.pop()
            continue
        key = prefixes[-1] + name
        path = base + key
        if name.endswith("/"):
            if avoided is None or root / key != avoided:
                prefixes.append(key)
                pending.append(_names(path))
        elif wanted(key) and (status := _status(path, root)):
            yield Local(key, path, Stamp.of(status))


def _names(folder: str) -> Iterator[str]:
    """Names in a folder in the order of the keys below it: a folder's name counts with its `/`."""
    with reading(Path(folder)):
        try:
            with os.scandir(folder) as entries:
                names = [
                    f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name
                    for entry in entries
                    if not is_hidden(entry.name)
                ]
        except FileNotFoundError:
            return iter(())  # removed since its name was read
    names.sort()
    return iter(names)


def _status(path: str, root: Path) -> os.stat_result | None:
    try:
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
            target = Path(path).resolve(strict=True)
            if not target.is_relative_to(root) or is_hidden(str(target.relative_to(root))):
                LOG.warning("skipping %s: the link leads out of the folder", path)
                return None
            status = os.stat(target)
    except FileNotFoundError:
        LOG.warning("skipping %s: it leads nowhere, or was just removed", path)
        return None
    except (OSError, RuntimeError) as error:
        LOG.warning("skipping %s: %s", path, error)
        return None
    if not stat.S_ISREG(status.st_mode):
        LOG.warning("skipping %s: it is no regular file", path)
        return None
    return status


def listing(objects: Iterator[ObjectInfo], prefix: str, wanted: Wanted) -> Iterator[tuple[str, ObjectInfo]]:
    """Objects with their keys relative to the prefix. Left out: markers of folders (`name/`), temporaries and locks."""
    last = ""
    for info in objects:
        key = info.key[len(prefix) :]
        if key and key <= last:
            # a merge of unsorted sides would delete or send what is there
            raise StorageError(
                f"the listing is not sorted: {key!r} after {last!r}",
                where=f"list {prefix}",
                fix="use a bucket that lists keys in order; directory buckets (S3 Express) do not",
            )
        last = key
        if key and not key.endswith("/") and not is_hidden(key) and wanted(key):
            yield key, info


def join(locals_: Iterator[Local], remotes: Iterator[tuple[str, ObjectInfo]]) -> Iterator[Pair]:
    """Merge both sides, ascending."""
    local, remote = next(locals_, None), next(remotes, None)
    while local or remote:
        if remote is None or (local is not None and local.key < remote[0]):
            assert local is not None
            yield Pair(local.key, local, None)
            local = next(locals_, None)
        elif local is None or remote[0] < local.key:
            yield Pair(remote[0], None, remote[1])
            remote = next(remotes, None)
        else:
            yield Pair(local.key, local, remote[1])
            local, remote = next(locals_, None), next(remotes, None)
