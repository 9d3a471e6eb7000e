"""Which keys can be written to every kind of bucket."""

import re
from collections.abc import Container

from wmtp_worker.errors import InputError

# S3's limit; the other providers allow as much or more
_LONGEST = 1024
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def check_key(key: str, where: str) -> None:
    """Raise `InputError` for a key that not every provider keeps as it is.

    That is one with an empty, `.` or `..` part, a control character or a lone surrogate, or of more than 1,024 bytes.
    """
    if (trouble := _trouble(key)) is not None:
        raise _refused(key, trouble, where)


def check_copy(source: str, target: str, where: str) -> None:
    """Raise `InputError` for a target as `check_key` does, unless its source is no better.

    Consoles make markers of folders (`name/`), and other tools keys of all kinds: what is there can be set aside.
    """
    if _trouble(source) is None:
        check_key(target, where)


def check_path(key: str, where: str, refused: Container[str] = (".", "..")) -> None:
    """Raise `InputError` for what as a path means another one or none: empty, or with a part that is `refused`."""
    if not key or "\0" in key or any(part in refused for part in key.split("/")):
        raise _refused(key, "is empty, or has an empty, '.' or '..' part or a NUL", where)
    if not _is_text(key):
        raise _refused(key, "is no Unicode text", where)


def _trouble(key: str) -> str | None:
    if not _is_text(key):
        return "is no Unicode text"
    if any(part in ("", ".", "..") for part in key.split("/")):
        return "has an empty, '.' or '..' part"
    if _CONTROL.search(key):
        return "has a control character"
    return f"is longer than {_LONGEST} bytes" if len(key.encode()) > _LONGEST else None


def _is_text(key: str) -> bool:
    # a lone surrogate is none
    return key.isascii() or not any("\ud800" <= character <= "\udfff" for character in key)


def _refused(key: str, why: str, where: str) -> InputError:
    # a lone surrogate could not be printed
    where = where.encode(errors="backslashreplace").decode()
    return InputError(f"the key {key!r} {why}", where=where, fix="give the file another name")
