"""Atomic local writes: a reader sees the old file or the whole new one, never a part."""

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from wmtp_worker.errors import DiskFullError, InputError

_FULL = (errno.ENOSPC, errno.EDQUOT)
TEMPORARY_PREFIX = ".tmp-"  # of a process that writes it: swept when that is gone
PARTIAL_PREFIX = ".partial-"  # what the next process goes on with
SET_ASIDE_PREFIX = "set-aside-"


def temporary(path: Path) -> Path:
    """A hidden name beside `path`, on the same file system, so that a rename is atomic."""
    return path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{os.getpid()}")


def fsync_path(path: Path) -> None:
    """Force a file's content, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(written: Path, path: Path) -> None:
    """Rename a finished file or folder to its final name and make the rename durable.

    Atomic: after a crash `path` is either absent (or the old file) or complete.
    """
    written.replace(path)
    fsync_path(path.parent)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; on success it becomes `path`, on failure it is removed.

    Raises `DiskFullError` where the disk filled up and `InputError` where it may not or cannot be written.
    """
    written = temporary(path)
    with disk_errors(path.parent):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield written
            fsync_path(written)
            publish(written, path)
        finally:
            written.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text`, atomically and durably."""
    with atomic_path(path) as written:
        written.write_text(text, encoding="utf-8")


def write_json(path: Path, document: Any) -> None:
    """Replace `path` by `document` as JSON, atomically and durably."""
    write_text(path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def set_aside(folder: Path, items: Iterable[Path]) -> Path:
    """Move files and folders, in this order, into `folder/set-aside-<UTC time>/`, where nothing looks for them."""
    aside = folder / f"{SET_ASIDE_PREFIX}{datetime.now(UTC):%Y%m%dT%H%M%S-%f}"
    with disk_errors(folder):
        aside.mkdir()
        for item in items:
            shutil.move(item, aside / item.name)  # the logs may lie on another disk
        fsync_path(folder)
    return aside


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn "no space left" and whatever else the operating system refuses into the worker's own errors.

    safetensors and torch wrap the operating system's error in their own, so the text and the chain are searched.
    """
    try:
        yield
    except Exception as error:
        if _says_full(error):
            raise DiskFullError(
                "the disk is full",
                where=str(folder),
                fix="free some space, or set WMTP_WORKDIR to a larger disk",
            ) from error
        if isinstance(error, OSError):
            raise InputError(
                f"cannot write {error.filename or folder}: {error.strerror or error}",
                where=f"folder {folder}",
                fix="give the worker's user write access, or set WMTP_WORKDIR to a folder it may write",
            ) from error
        raise


def _says_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
