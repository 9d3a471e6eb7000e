"""What Google Cloud Storage and Google's credentials say, in the worker's own errors."""

from __future__ import annotations

import google.auth.exceptions
from google.api_core import exceptions
from google.cloud.storage.exceptions import DataCorruption, InvalidResponse  # type: ignore[import-untyped]

from wmtp_worker.errors import (
    AccessDenied,
    BucketNotFound,
    ObjectNotFound,
    PreconditionFailed,
    StorageError,
    TransientError,
    WorkerError,
)
from wmtp_worker.storage.http import network_error

CREDENTIALS = (
    "set GOOGLE_APPLICATION_CREDENTIALS to a credentials file, GOOGLE_APPLICATION_CREDENTIALS_JSON to its content, "
    "or run where the machine has a service account"
)
_PRECONDITION = (304, 412)
_PASSING = (408, 409, 429)
# refusals that are about how often, not about who
_LIMITS = ("rateLimitExceeded", "userRateLimitExceeded", "quotaExceeded")
_NO_OBJECT = "No such object"
# how the server says that what came is not what was announced
_DAMAGED = "doesn't match calculated"


def translate(error: Exception, where: str) -> Exception:
    """One of the worker's errors for whatever the SDK raised; the error itself where it is a bug."""
    if isinstance(error, WorkerError):
        return error
    if isinstance(error, InvalidResponse):
        error = exceptions.from_http_response(error.response)
    if isinstance(error, exceptions.GoogleAPICallError):
        return _of_status(error, where)
    if isinstance(error, DataCorruption):
        return TransientError("the bytes changed on the way", where=where)
    if isinstance(error, google.auth.exceptions.GoogleAuthError):
        return _of_credentials(error, where)
    return network_error(error, where) or error


def no_bucket(bucket: str, where: str) -> BucketNotFound:
    return BucketNotFound(f"there is no bucket {bucket!r}", where=where, fix="set CLOUD_BUCKET to one that exists")


def is_damaged(error: Exception) -> bool:
    """Whether the server says that what came is not what the checksum was computed from."""
    return isinstance(error, exceptions.BadRequest) and _DAMAGED in _words(error)


def is_ambiguous(error: Exception) -> bool:
    """Whether a 404 leaves open if it is the object or the bucket that is missing."""
    return isinstance(error, ObjectNotFound) and _NO_OBJECT not in error.what


def _of_status(error: exceptions.GoogleAPICallError, where: str) -> StorageError:
    status, says = int(error.code or 0), _words(error)
    if status in _PRECONDITION:
        return PreconditionFailed("somebody else changed the object first", where=where)
    if status == 404:
        if "bucket" in says.lower() and _NO_OBJECT not in says:
            return BucketNotFound(says, where=where, fix="set CLOUD_BUCKET to one that exists")
        return ObjectNotFound(says, where=where)
    if status == 401:
        return AccessDenied(says, where=where, fix=CREDENTIALS)
    reasons = [str(detail.get("reason")) for detail in error.errors if isinstance(detail, dict)]
    if status == 403 and not any(reason in _LIMITS for reason in reasons):
        fix = "give the account the role Storage Object User (roles/storage.objectUser) on the bucket"
        return AccessDenied(says, where=where, fix=fix)
    if status == 403 or status in _PASSING or status >= 500 or _DAMAGED in says:
        return TransientError(f"{says} (HTTP {status})", where=where)
    if status == 400 and "bucket name" in says:
        return BucketNotFound(says, where=where, fix="correct CLOUD_BUCKET")
    return StorageError(
        f"the server refused it: {says} (HTTP {status})", where=where, fix="correct the request's settings"
    )


def _of_credentials(error: google.auth.exceptions.GoogleAuthError, where: str) -> StorageError:
    if isinstance(error, google.auth.exceptions.TransportError) or error.retryable:
        return TransientError("Google's token server cannot be reached", where=where)
    says = str(error.args[0]) if error.args else type(error).__name__
    if "iat" in says and "exp" in says:
        return AccessDenied("the token server refuses our clock", where=where, fix="set this machine's clock right")
    if isinstance(error, google.auth.exceptions.RefreshError | google.auth.exceptions.InvalidOperation):
        return AccessDenied(f"the credentials were refused: {says[:200]}", where=where, fix=CREDENTIALS)
    return AccessDenied(f"there are no usable Google credentials: {says[:200]}", where=where, fix=CREDENTIALS)


def _words(error: exceptions.GoogleAPICallError) -> str:
    """The server's own message, without the method and address that the SDK puts before it."""
    try:
        return str(error.response.json()["error"]["message"])
    except (AttributeError, ValueError, KeyError, TypeError):
        text = getattr(error.response, "text", "") or str(error.code)
        return text.strip()[:200]
