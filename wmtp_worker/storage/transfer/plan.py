"""What differs between a folder and a prefix: both sides sorted the same way and merged, in flat memory."""

import errno
import logging
import os
import stat
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from wmtp_worker.errors import InputError, StorageError
from wmtp_worker.storage.objects import ObjectInfo
from wmtp_worker.storage.transfer.journal import Stamp
from wmtp_worker.storage.transfer.paths import is_hidden, reading, shown

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


class _Level:
    """A folder of the walk, held open: so it can be told from another one under the same name, or from none."""

    def __init__(self, base: str, prefix: str) -> None:
        """Raises `FileNotFoundError` and `NotADirectoryError` where it was removed since its name was read."""
        self.prefix = prefix
        self._path = base + prefix
        self._descriptor = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.names = iter(self._sorted())
        except BaseException:
            self.close()
            raise

    def _sorted(self) -> list[str]:
        """Its names in the order of the keys below it: a folder's name counts with its `/`."""
        with os.scandir(self._descriptor) as entries:
            return sorted(
                f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name
                for entry in entries
                if not is_hidden(entry.name)
            )

    def is_there(self) -> bool:
        """Whether it is still what its path leads to: it was not removed, and its disk not unmounted."""
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._descriptor))
        except OSError:
            return False

    def close(self) -> None:
        os.close(self._descriptor)


def walk(folder: Path, wanted: Wanted, avoid: Path | None = None, *, strict: bool = False) -> Generator[Local]:
    """Every file below `folder`, ascending by the UTF-8 bytes of its key. Memory: the names of one folder a level.

    Left out: temporaries, locks, everything in `avoid`, what is no regular file. Links to files below the folder are
    followed; other links are skipped with a warning. No folder there: nothing. Raises `InputError` where it cannot be
    read, or vanishes meanwhile. A folder in it that vanishes is left out with a warning; `strict`, for who deletes what
    is not there, makes an error of that and of every file whose facts cannot be had.
    """
    with reading(folder):
        try:
            root = folder.resolve(strict=True)
        except FileNotFoundError:
            return
        avoided = avoid.resolve() if avoid else None
        base = f"{folder}/".replace("//", "/")
        levels = [_Level(base, "")]
    try:
        while levels:
            level = levels[-1]
            name = next(level.names, None)
            if name is None:
                if (strict or len(levels) == 1) and not level.is_there():
                    raise _vanished(base + level.prefix)
                levels.pop().close()
                continue
            key = level.prefix + name
            if not name.endswith("/"):
                if wanted(key) and (status := _status(base + key, root, levels, strict)):
                    yield Local(key, base + key, Stamp.of(status))
            elif (avoided is None or root / key != avoided) and (inner := _enter(base, key, levels[0], strict)):
                levels.append(inner)
    finally:
        for level in levels:
            level.close()


def _enter(base: str, key: str, root: _Level, strict: bool) -> _Level | None:
    with reading(Path(base + key)):
        try:
            return _Level(base, key)
        except (FileNotFoundError, NotADirectoryError) as error:
            if strict or not root.is_there():
                raise _vanished(base + key) from error
    LOG.warning("skipping %s: it was just removed", shown(base + key))
    return None


def _vanished(path: str) -> InputError:
    return InputError(
        "a folder vanished, or was replaced, while its files were listed",
        where=shown(path),
        fix="see that its disk is mounted and nobody removes folders, then do it again",
    )


def _status(path: str, root: Path, levels: Sequence[_Level], strict: bool) -> os.stat_result | None:
    try:
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
            target = Path(path).resolve(strict=True)
            if not target.is_relative_to(root) or is_hidden(str(target.relative_to(root))):
                LOG.warning("skipping %s: the link leads out of the folder", shown(path))
                return None
            status = os.stat(target)
    except FileNotFoundError as error:
        if not levels[-1].is_there() and (strict or not levels[0].is_there()):
            raise _vanished(os.path.dirname(path)) from error
        LOG.warning("skipping %s: it leads nowhere, or was just removed", shown(path))
        return None
    except (OSError, RuntimeError) as error:
        if strict and not (isinstance(error, RuntimeError) or error.errno == errno.ELOOP):
            with reading(Path(path)):
                raise
        LOG.warning("skipping %s: %s", shown(path), shown(str(error)))
        return None
    if not stat.S_ISREG(status.st_mode):
        LOG.warning("skipping %s: it is no regular file", shown(path))
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
                where=shown(f"list {prefix}"),
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
