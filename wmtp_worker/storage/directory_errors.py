"""What the operating system says about a folder that is used as a bucket, in the worker's own errors."""

from __future__ import annotations

import errno
from pathlib import Path

from wmtp_worker.errors import (
    AccessDenied,
    BucketNotFound,
    DiskFullError,
    InputError,
    ObjectNotFound,
    TransientError,
    WorkerError,
)

MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
_PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.ENOLCK)


def translate(error: OSError, where: str, bucket: Path) -> WorkerError:
    """The worker's error for one about a file of a bucket that is there."""
    says = error.strerror or str(error)
    if error.errno in _FULL:
        return DiskFullError("the disk is full", where=where, fix="free some space, or use another bucket")
    if error.errno in _DENIED:
        fix = f"give the worker's user access to {bucket}, or mount it for writing"
        return AccessDenied(says.lower(), where=where, fix=fix)
    if error.errno in MISSING:
        return ObjectNotFound("there is no such object", where=where)
    if error.errno in _PASSING:
        return TransientError(says.lower(), where=where)
    return InputError(f"the file system refuses it: {says}", where=where, fix="give the file another name")


def no_bucket(bucket: Path, where: str) -> BucketNotFound:
    """Neither the folder is there nor the one that it would be made in."""
    fix = f"make {bucket.parent}, mount the disk, or set CLOUD_BUCKET to another folder"
    return BucketNotFound(f"there is no folder {bucket}", where=where, fix=fix)


def vanished(bucket: Path, where: str) -> BucketNotFound:
    """It was there before; what is there now, if anything is, is another folder."""
    fix = "see that its disk is mounted and nobody removes the folder, then start again"
    return BucketNotFound(f"the folder {bucket} vanished, or was replaced by another one", where=where, fix=fix)
