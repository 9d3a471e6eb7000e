"""The work directory: made if it is not there, and proven writable before anything is computed."""

import errno
import os
from pathlib import Path

from wmtp_worker.errors import DiskFullError, SettingsError


def prepare(workdir: Path) -> Path:
    """Create the work directory and write, sync, rename and delete a small file in it; return it.

    Raises SettingsError if it cannot be created or written, DiskFullError if there is no room. The probe is
    gone afterwards, the directory stays.
    """
    first, second = (workdir / f".writable-{os.getpid()}{end}" for end in (".tmp", ""))
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        try:
            with first.open("wb") as file:
                file.write(b"a probe that may be deleted\n")
                file.flush()
                os.fsync(file.fileno())
            first.replace(second)
        finally:
            first.unlink(missing_ok=True)
            second.unlink(missing_ok=True)
    except OSError as error:
        what = f"the work directory {str(workdir)!r} cannot be written: {error.strerror or error}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(what, fix="make room there, or set WMTP_WORKDIR to a larger disk") from error
        fix = "set WMTP_WORKDIR to a folder that this user may create and write"
        raise SettingsError(what, where="run.workdir", fix=fix) from error
    return workdir
