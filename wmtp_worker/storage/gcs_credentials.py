"""Where the credentials for Google Cloud Storage come from."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, MutableMapping
from typing import Any
from urllib.parse import urlsplit

import google.auth
from google.auth import aws, credentials, exceptions, identity_pool, impersonated_credentials
from google.oauth2 import credentials as user
from google.oauth2 import service_account

from wmtp_worker.errors import AccessDenied
from wmtp_worker.settings.checks import is_loopback
from wmtp_worker.storage.gcs_errors import CREDENTIALS

# objects can be read and written; access rules cannot
_SCOPES = ("https://www.googleapis.com/auth/devstorage.read_write",)
_GOOGLE = ".googleapis.com"


def find_credentials(endpoint: str, where: str) -> credentials.Credentials:
    """GOOGLE_APPLICATION_CREDENTIALS_JSON, else what Google's libraries find; none at all for a server on loopback.

    Raises `AccessDenied`. Only a machine without any of Google's variables and files is asked, over the network,
    whether it has a service account.
    """
    content = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS_JSON")
    host = urlsplit(endpoint).hostname or ""
    if not content and not os.environ.get("GOOGLE_APPLICATION_CREDENTIALS") and is_loopback(host):
        return credentials.AnonymousCredentials()
    found = _from_json(content, where) if content else _default(where)
    return found if host.endswith(_GOOGLE) else _Tokens(found)


class _Tokens(credentials.Credentials):
    """The tokens of other credentials, and nothing else.

    Google's own also ask Google, in a thread, where data of the account may lie. Other servers have no use for that.
    """

    def __init__(self, inner: credentials.Credentials) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._inner = inner
        self._refreshing = threading.Lock()

    def refresh(self, request: Any) -> None:
        """A new token."""
        self._inner.refresh(request)

    def before_request(self, request: Any, method: str, url: str, headers: MutableMapping[str, str]) -> None:
        """Put the token into the headers, a new one if it has expired."""
        with self._refreshing:
            if not self._inner.valid:
                self._inner.refresh(request)
        headers["authorization"] = f"Bearer {self._inner.token}"


def _default(where: str) -> credentials.Credentials:
    try:
        return google.auth.default(scopes=_SCOPES)[0]
    # the cause may quote the file
    except (exceptions.GoogleAuthError, ValueError, OSError):
        raise AccessDenied("there are no usable Google credentials", where=where, fix=CREDENTIALS) from None


def _from_json(content: str, where: str) -> credentials.Credentials:
    fix = "put the whole content of a Google credentials file into GOOGLE_APPLICATION_CREDENTIALS_JSON"
    try:
        return _of_kind(json.loads(content))  # type: ignore[no-any-return]
    # the cause may quote the content
    except (exceptions.GoogleAuthError, ValueError, KeyError, TypeError, AttributeError):
        what = "GOOGLE_APPLICATION_CREDENTIALS_JSON is not the content of a Google credentials file"
        raise AccessDenied(what, where=where, fix=fix) from None


def _of_kind(info: Mapping[str, Any]) -> Any:
    """Credentials of the kinds that Google's tools write."""
    match info["type"]:
        case "service_account":
            return service_account.Credentials.from_service_account_info(info, scopes=_SCOPES)
        case "authorized_user":
            return user.Credentials.from_authorized_user_info(info, scopes=_SCOPES)
        case "impersonated_service_account":
            made = impersonated_credentials.Credentials
            return made.from_impersonated_service_account_info(info, scopes=_SCOPES)
        case "external_account":
            kind: Any = aws.Credentials if "aws" in info["subject_token_type"] else identity_pool.Credentials
            return kind.from_info(info, scopes=_SCOPES)
    raise ValueError("unknown type")
