"""Which local path a key may become, which files belong to a transfer, and what stands in the way."""

import fnmatch
import os
import re
import stat
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from wmtp_worker.errors import InputError
from wmtp_worker.storage.atomic import TEMPORARY_PREFIX

# what other parts of the worker hide: half-made files, and locks
_HIDDEN = (TEMPORARY_PREFIX, ".partial-", ".lock-")
_LOCK_NAME = ".lock"
_NAME_BYTES = 255
_PLAIN = re.compile(r"[A-Za-z0-9_ +=@,-][A-Za-z0-9_. +=@,-]*(?:/[A-Za-z0-9_ +=@,-][A-Za-z0-9_. +=@,-]*)*")


def safe_path(folder: Path, key: str) -> Path:
    """`folder / key`, where that is a path below the folder that no symbolic link leads out of.

    Raises `InputError` for `..`, absolute keys, backslashes, control characters, what is no Unicode text, names that
    normalise (NFKC) to one of these, names over 255 bytes, and paths of which a component is a symbolic link.
    """
    check_key(key)
    path = folder
    for name in key.split("/"):
        path = path / name
        try:
            mode = os.lstat(path).st_mode
        except FileNotFoundError:
            return folder / key
        except OSError as error:
            raise InputError(f"cannot use the path {key!r}: {error.strerror}", where=str(folder)) from error
        if stat.S_ISLNK(mode):
            raise InputError(
                f"{str(path)!r} is a symbolic link, which could lead out of the folder",
                where=f"key {key!r}",
                fix="remove the link, or choose another folder",
            )
    return path


def check_key(key: str) -> None:
    """Raise `InputError` unless `key` is a relative path of plain names. Touches no file."""
    if len(key) <= _NAME_BYTES and _PLAIN.fullmatch(key):
        return
    trouble = next((found for name in key.split("/") if (found := _trouble(name))), None)
    if trouble:
        raise InputError(
            f"the name {key[:200]!r} cannot be used as a path: it has {trouble}", fix="rename the file or object"
        )


def _trouble(name: str) -> str | None:
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
        return "a control character, or bytes that are no UTF-8"
    if len(name.encode()) > _NAME_BYTES:
        return f"a part longer than {_NAME_BYTES} bytes"
    for form in (name, unicodedata.normalize("NFKC", name)):
        if form in ("", ".", ".."):
            return "an empty, '.' or '..' part, or one that looks like it"
        if "\\" in form or "/" in form:
            return "a backslash, or a character that looks like a separator"
    return None


def is_same_place(folder: Path, url: str, prefix: str) -> bool:
    """Whether `folder` itself is what lies under `prefix`, in a store that is a folder too; links are followed.

    Raises `InputError` where one lies in the other: each transfer would make more to transfer.
    """
    if "://" in url:
        return False
    here = Path(os.path.realpath(folder))
    there = Path(os.path.realpath(f"{url}/{prefix.strip('/')}"))
    if here != there and (here.is_relative_to(there) or there.is_relative_to(here)):
        raise InputError(
            "one side lies in the other", where=shown(f"{here} and {there}"), fix="choose folders that lie apart"
        )
    return here == there


def shown(text: str) -> str:
    """`text` for people and logs: what would move a cursor, change a colour or be no text at all is escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def is_hidden(key: str) -> bool:
    """Whether a path is that of a temporary or a lock, which never travel."""
    return "." in key and any(name.startswith(_HIDDEN) or name == _LOCK_NAME for name in key.split("/"))


def selector(include: Sequence[str], exclude: Sequence[str]) -> Callable[[str], bool]:
    """Whether a relative path takes part: matched by some of `include` (if there are any) and none of `exclude`.

    Shell patterns, where `*` matches `/` too. A pattern without `/` is matched against the name alone; one that ends in
    `/` takes everything below that folder.
    """
    wanted, unwanted = _patterns(include), _patterns(exclude)
    return lambda path: (wanted is None or bool(wanted(path))) and not (unwanted is not None and unwanted(path))


def _patterns(patterns: Sequence[str]) -> Callable[[str], object] | None:
    if not patterns:
        return None
    paths = [f"{pattern}*" if pattern.endswith("/") else pattern for pattern in patterns if "/" in pattern]
    path_match = _any_of([pattern.lstrip("/") for pattern in paths])
    name_match = _any_of([pattern for pattern in patterns if "/" not in pattern])
    return lambda key: path_match(key) or name_match(key.rpartition("/")[2])


def _any_of(patterns: Sequence[str]) -> Callable[[str], object]:
    # (?!) matches nothing
    return re.compile("|".join(f"(?:{fnmatch.translate(pattern)})" for pattern in patterns) or "(?!)").match


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the operating system says about a file that is read into an `InputError`."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot read {shown(str(error.filename or path))}: {error.strerror or error}",
            where=shown(str(path)),
            fix="check that it exists and that the worker's user may read it",
        ) from error
