"""What went wrong with S3, whichever library says it, as one of the worker's own errors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import botocore.exceptions
import obstore.exceptions

from wmtp_worker.errors import (
    AccessDenied,
    BucketNotFound,
    InputError,
    IntegrityError,
    ObjectNotFound,
    PreconditionFailed,
    StorageError,
    TransientError,
    WorkerError,
)

_KEYS = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
_EXPIRED = "get new temporary credentials: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN"
_REGION = "set AWS_REGION (or cloud.region) to the region of the bucket"
_AUTHORITY = "set AWS_CA_BUNDLE to a file with the certificate of the server's authority"
_KMS = "check cloud.kms_key, and that the credentials may use it"
# S3's code of an error -> what to do; all of these are refusals
_REFUSALS: Mapping[str, str] = MappingProxyType(
    {
        "AccessDenied": "give the credentials the rights s3:ListBucket, s3:GetObject, s3:PutObject, s3:DeleteObject "
        "and s3:AbortMultipartUpload, or use others",
        "AllAccessDisabled": "use another bucket",
        "AccountProblem": "use another account",
        "InvalidAccessKeyId": _KEYS,
        "SignatureDoesNotMatch": _KEYS,
        "InvalidSecurity": _KEYS,
        "InvalidToken": _EXPIRED,
        "ExpiredToken": _EXPIRED,
        "ExpiredTokenException": _EXPIRED,
        "TokenRefreshRequired": _EXPIRED,
        "RequestExpired": "set this machine's clock",
        "RequestTimeTooSkewed": "set this machine's clock: it is more than 15 minutes off",
        "AuthorizationHeaderMalformed": _REGION,
        "PermanentRedirect": _REGION,
        "TemporaryRedirect": _REGION,
        "IllegalLocationConstraintException": _REGION,
    }
)
_PASSING = frozenset(
    {
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "RequestLimitExceeded",
        "RequestTimeout",
        "RequestTimeoutException",
        "InternalError",
        "ServiceUnavailable",
        # it was somebody else's turn; nothing was written
        "ConditionalRequestConflict",
        "OperationAborted",
        # bytes were changed or lost on the way
        "BadDigest",
        "XAmzContentSHA256Mismatch",
        "XAmzContentChecksumMismatch",
        "IncompleteBody",
    }
)
# obstore also raises FileNotFoundError
SDK_ERRORS = (
    botocore.exceptions.BotoCoreError,
    botocore.exceptions.ClientError,
    obstore.exceptions.BaseError,
    OSError,
)
_NO_CREDENTIALS = (
    botocore.exceptions.NoCredentialsError,
    botocore.exceptions.PartialCredentialsError,
    botocore.exceptions.CredentialRetrievalError,
    botocore.exceptions.RefreshWithMFAUnsupportedError,
    botocore.exceptions.SSOError,
    botocore.exceptions.TokenRetrievalError,
    botocore.exceptions.ProfileNotFound,
    botocore.exceptions.ConfigParseError,
    botocore.exceptions.ConfigNotFound,
    botocore.exceptions.UnknownCredentialError,
    botocore.exceptions.InvalidConfigError,
)
_STATUS = re.compile(r"non-2xx status code: (\d{3})")
_TAG = r"<{0}>([^<]*)</{0}>"
_UNTRUSTED = re.compile("InvalidCertificate|CERTIFICATE_VERIFY_FAILED|invalid peer certificate")


@dataclass(frozen=True)
class Answer:
    """What a server said: HTTP status, S3's code (empty where there is none) and message, the bucket's region."""

    status: int
    code: str
    message: str
    region: str | None = None


def answer_of(error: Exception) -> Answer | None:
    """The server's answer in an exception of botocore or obstore; None where there was none."""
    if isinstance(error, botocore.exceptions.ClientError):
        said: Mapping[str, Any] = error.response.get("Error", {})
        meta: Mapping[str, Any] = error.response.get("ResponseMetadata", {})
        code = str(said.get("Code", ""))
        region = said.get("Region") or meta.get("HTTPHeaders", {}).get("x-amz-bucket-region")
        # without a body the code is the status
        named = "" if code.isdigit() else code
        return Answer(int(meta.get("HTTPStatusCode", 0)), named, str(said.get("Message", "")), region)
    # the rest of obstore's text is a dump of its own state
    text = str(error).partition("Debug source:")[0]
    if "redirect without LOCATION" in text:
        return Answer(301, "PermanentRedirect", "")
    if found := _STATUS.search(text):
        tags = {tag: re.search(_TAG.format(tag), text) for tag in ("Code", "Message", "Region")}
        inner = {tag: match[1] for tag, match in tags.items() if match}
        return Answer(int(found[1]), inner.get("Code", ""), inner.get("Message", ""), inner.get("Region"))
    return None


def translated(error: Exception, where: str, bucket: str) -> WorkerError:
    """The worker's error for an exception of botocore or obstore."""
    answer = answer_of(error)
    if answer is not None:
        return _answered(answer, where, bucket)
    text = str(error)
    if _UNTRUSTED.search(text):
        return AccessDenied("the server's certificate is not trusted", where=where, fix=_AUTHORITY)
    if isinstance(error, _NO_CREDENTIALS):
        return no_credentials(where, str(error))
    if isinstance(error, obstore.exceptions.UnauthenticatedError):
        # its text has the provider's traceback in it
        return no_credentials(where, "they cannot be read")
    if isinstance(error, botocore.exceptions.ParamValidationError):
        what = text.removeprefix("Parameter validation failed:").strip()
        if "bucket name" in what.lower():
            return no_bucket(bucket, where, f"{bucket!r} cannot be the name of a bucket")
        return InputError(what, where=where)
    if isinstance(error, botocore.exceptions.EndpointConnectionError | botocore.exceptions.HTTPClientError):
        return TransientError(_short(text), where=where, fix="see whether the network and CLOUD_ENDPOINT_URL are right")
    if isinstance(error, obstore.exceptions.BaseError | OSError):
        return TransientError(_connection(text), where=where, fix="see whether the network and the endpoint are right")
    return StorageError(_short(text) or type(error).__name__, where=where)


def no_credentials(where: str, why: str) -> AccessDenied:
    """No credentials, of which `why` says more."""
    fix = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or run where an instance role has access"
    return AccessDenied(f"no credentials for S3: {_short(why)}", where=where, fix=fix)


def no_bucket(bucket: str, where: str, what: str | None = None) -> BucketNotFound:
    """There is no bucket of that name."""
    fix = "check CLOUD_BUCKET, CLOUD_ENDPOINT_URL and AWS_REGION"
    return BucketNotFound(what or f"there is no bucket {bucket!r}", where=where, fix=fix)


def _answered(answer: Answer, where: str, bucket: str) -> StorageError:
    code, status = answer.code, answer.status
    says = f"the server says {status} {code}".rstrip() + (f": {answer.message}" if answer.message else "")
    if code == "NoSuchBucket" or code == "InvalidBucketName":
        return no_bucket(bucket, where)
    if status == 412 or code == "PreconditionFailed":
        return PreconditionFailed("somebody else changed the object first", where=where)
    if code in _PASSING:
        return TransientError(says, where=where)
    if code == "InvalidPart":
        what = "somebody else's parts are among those of the upload"
        return IntegrityError(what, where=where, fix="upload the file again")
    if code in _REFUSALS or status in (301, 307, 401, 403):
        fix = _REFUSALS.get(code, _REGION if status in (301, 307) else _KEYS)
        if fix == _REGION and answer.region:
            fix = f"set AWS_REGION={answer.region}"
        return AccessDenied(says, where=where, fix=fix)
    if code.startswith("KMS."):
        return AccessDenied(says, where=where, fix=_KMS)
    if status == 404:
        what = "there is no such upload" if code == "NoSuchUpload" else "there is no such object"
        return ObjectNotFound(what, where=where)
    if status in (408, 409, 425, 429) or (status >= 500 and status not in (501, 505)):
        return TransientError(says, where=where)
    return StorageError(says, where=where, fix="see whether the server is one for S3, and cloud.checksum and cloud.sse")


def refuses_checksum(error: Exception) -> bool:
    """Whether a server says that it does not know the header of a checksum (and not that the checksum is wrong)."""
    answer = answer_of(error)
    if answer is None or answer.status not in (400, 501) or answer.code in _PASSING:
        return False
    return "checksum" in f"{answer.code} {answer.message}".lower() or answer.code == "NotImplemented"


def _connection(text: str) -> str:
    kind = re.search(r"kind: (\w+),", text.partition("Debug source:")[2])
    names = {"Connect": "no connection", "Timeout": "the server did not answer in time", "Interrupted": "cut off"}
    what = names.get(kind[1] if kind else "", "the connection failed")
    found = re.search(r'"(?:failed to lookup|dns)[^"]*"', text)
    return f"{what}: {found[0][1:-1]}" if found else what


def _short(text: str) -> str:
    return text.partition("\n")[0][:300]
