"""What Azure Blob Storage and Azure's credentials say, in the worker's own errors."""

from __future__ import annotations

from azure.core.exceptions import AzureError, ClientAuthenticationError, HttpResponseError

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
    "set AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT with AZURE_STORAGE_KEY or AZURE_STORAGE_SAS_TOKEN, "
    "or run where DefaultAzureCredential finds an identity (AZURE_CLIENT_ID and so on, or a managed one)"
)
_NO_CONTAINER = ("ContainerNotFound", "ContainerBeingDeleted", "ContainerDisabled")
_BAD_NAME = ("InvalidResourceName", "OutOfRangeInput")
_CHANGED = ("BlobAlreadyExists", "ConditionNotMet", "TargetConditionNotMet", "SourceConditionNotMet", "BlobOverwritten")
_DAMAGED = ("Md5Mismatch", "Crc64Mismatch")
# blocks that were there are not any more: another commit of the blob throws them away
_PARTS_GONE = ("InvalidBlockList", "InvalidBlobOrBlock")
# conflicts with what the blob is, which no waiting ends
_LASTING = (
    "SnapshotsPresent",
    "InvalidBlobType",
    "UnauthorizedBlobOverwrite",
    "BlobArchived",
    "BlobBeingRehydrated",
    "FeatureVersionMismatch",
    "SnapshotCountExceeded",
    "BlockCountExceedsLimit",
    "DirectoryNotEmpty",
    "PathConflict",
    "ResourceTypeMismatch",
)
_CLOCK = "Request date header"


def translate(error: Exception, where: str) -> Exception:
    """One of the worker's errors for whatever the SDK raised; the error itself where it is a bug."""
    if isinstance(error, WorkerError):
        return error
    # the SDK stumbles over answers of others than Azure, such as a gateway's page
    while isinstance(error, TypeError | AttributeError) and isinstance(error.__context__, Exception):
        error = error.__context__
    # which the SDK also raises, without an answer, for connections that break in a body
    if isinstance(error, HttpResponseError) and error.response is not None:
        return _of_answer(error, where)
    if isinstance(error, ClientAuthenticationError):
        return AccessDenied(
            f"there are no usable Azure credentials: {_first_line(error)}", where=where, fix=CREDENTIALS
        )
    if type(error).__name__ == "AzureSigningError":
        return AccessDenied("the account key is not one", where=where, fix=CREDENTIALS)
    known = network_error(error, where)
    if known is None and isinstance(error, AzureError):
        known = TransientError(f"the connection failed: {type(error).__name__}", where=where)
    return known or error


def no_container(name: str, where: str) -> BucketNotFound:
    fix = "set CLOUD_BUCKET to a container that exists"
    return BucketNotFound(f"there is no container {name!r}", where=where, fix=fix)


def is_ambiguous(error: Exception) -> bool:
    """Whether a 404 leaves open if it is the blob or the container that is missing."""
    return isinstance(error, ObjectNotFound) and "BlobNotFound" not in error.what


def _of_answer(error: HttpResponseError, where: str) -> StorageError:
    status = int(error.status_code or 0)
    code = str(getattr(getattr(error, "error_code", None), "value", getattr(error, "error_code", None)) or "")
    says = f"{_first_line(error)} ({code or status})"
    if code in _NO_CONTAINER or code in _BAD_NAME:
        return BucketNotFound(says, where=where, fix="set CLOUD_BUCKET to a container that exists")
    if code in _CHANGED or status in (304, 412):
        return PreconditionFailed("somebody else changed the object first", where=where)
    if code in _PARTS_GONE:
        return ObjectNotFound("the unfinished upload is gone", where=where)
    if status == 404:
        return ObjectNotFound(f"there is no such object ({code or status})", where=where)
    if status in (401, 403) or "Immutable" in code:
        return _denied(error, says, where)
    if code in _DAMAGED or (status == 400 and "md5" in says.lower()):
        return TransientError("the bytes changed on the way", where=where)
    if code in _LASTING:
        fix = "change the blob in Azure: its snapshots, tier or kind stand in the way"
        return StorageError(f"the server refused it: {says}", where=where, fix=fix)
    if status in (408, 409, 429) or status >= 500:
        return TransientError(says, where=where)
    return StorageError(f"the server refused it: {says}", where=where, fix="correct the settings of cloud")


def _denied(error: HttpResponseError, says: str, where: str) -> AccessDenied:
    if _CLOCK in str(error.message):
        return AccessDenied("the server refuses our clock", where=where, fix="set this machine's clock right")
    if "Permission" in says or "Immutable" in says:
        fix = "give the identity the role Storage Blob Data Contributor on the container"
        return AccessDenied(says, where=where, fix=fix)
    return AccessDenied(says, where=where, fix=CREDENTIALS)


def _first_line(error: AzureError) -> str:
    lines = str(error.message).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
