"""Locks between processes that write to one place; they die with their process."""

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wmtp_worker.storage.atomic import disk_errors
from wmtp_worker.storage.transfer.limits import POLL, Heed
from wmtp_worker.storage.transfer.paths import shown

LOG = logging.getLogger(__name__)


@contextmanager
def file_lock(path: Path, check: Heed) -> Iterator[None]:
    """Hold `path` exclusively, waiting for whoever has it; the file and its folder, if empty, are gone afterwards."""
    waited = False
    while (descriptor := _try(path)) is None:
        if not waited:
            LOG.info("waiting for another process that writes to %s", shown(str(path.parent.parent)))
            waited = True
        time.sleep(POLL)
        check()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        with contextlib.suppress(OSError):
            path.parent.rmdir()


@contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Hold `path` if nobody has it; yields whether."""
    descriptor = _try(path)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            path.unlink(missing_ok=True)
            os.close(descriptor)


def _try(path: Path) -> int | None:
    """An open descriptor that holds the lock, or None where somebody else does."""
    with disk_errors(path.parent):
        while True:
            descriptor = _open(path)
            if descriptor is None:
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # who held it before may have removed it meanwhile; then the name is another file's, or nobody's
                if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                    return descriptor
            except BlockingIOError:
                os.close(descriptor)
                return None
            except FileNotFoundError:
                pass
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)


def _open(path: Path) -> int | None:
    """The lock file, opened and perhaps made; None where its folder was removed in the same moment."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except FileNotFoundError:
        return None
    except FileExistsError:
        # raised by mkdir, too, for a folder that is gone by the time it looks
        if os.path.lexists(path.parent) and not path.parent.is_dir():
            raise
        return None
