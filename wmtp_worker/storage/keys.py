"""Which keys can be written to every kind of bucket."""

import re

from wmtp_worker.errors import InputError

# S3's limit; the other providers allow as much or more
_LONGEST = 1024
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def check_key(key: str, where: str) -> None:
    """Raise `InputError` for a key that not every provider keeps as it is.

    That is one with an empty, `.` or `..` part, a control character or a lone surrogate, or of more than 1,024 bytes.
    """
    try:
        size = len(key.encode())
    except UnicodeEncodeError:
        raise _refused(key, "is no Unicode text", where) from None
    if any(part in ("", ".", "..") for part in key.split("/")):
        raise _refused(key, "has an empty, '.' or '..' part", where)
    if _CONTROL.search(key):
        raise _refused(key, "has a control character", where)
    if size > _LONGEST:
        raise _refused(key, f"is longer than {_LONGEST} bytes", where)


def _refused(key: str, why: str, where: str) -> InputError:
    # a lone surrogate could not be printed
    where = where.encode(errors="backslashreplace").decode()
    return InputError(f"the key {key!r} {why}", where=where, fix="give the file another name")
