"""What the providers on `requests` share: one session's adapter, time-outs, and what the network's errors mean."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from http.client import HTTPException
from ssl import SSLCertVerificationError
from typing import Any

import requests
import urllib3.exceptions
from requests.adapters import HTTPAdapter
from requests.utils import get_environ_proxies

from wmtp_worker.errors import AccessDenied, StorageError, TransientError
from wmtp_worker.storage.certificates import check_certificates

# seconds: to connect (and to hand over one slice of a body), and between two packets of an answer
TIMEOUT = (10.0, 60.0)
_SLICE = 1 << 18
_SPARE_CONNECTIONS = 8
_CERTIFICATES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")


class _Slices:
    """A body in slices: a socket's time-out is for all that is sent at once, so one for 8 MB would fail slow links."""

    def __init__(self, body: Any) -> None:
        self._view = memoryview(body)

    def __len__(self) -> int:
        return self._view.nbytes

    def __iter__(self) -> Iterator[memoryview]:
        return (self._view[start : start + _SLICE] for start in range(0, len(self), _SLICE))


class _Adapter(HTTPAdapter):
    """Sends large bodies in slices, and has the same time-outs for every request, whatever an SDK thinks of."""

    def send(self, request: requests.PreparedRequest, *arguments: Any, **options: Any) -> requests.Response:
        body: Any = request.body
        if isinstance(body, bytes | bytearray | memoryview) and len(body) > _SLICE:
            request.body = _Slices(body)  # type: ignore[assignment]
        return super().send(request, *arguments, **{**options, "timeout": TIMEOUT})


def prepare_session(session: requests.Session, url: str, concurrency: int) -> None:
    """Give a session a pool for `concurrency` requests at once, without retries.

    Proxies and certificates are read from the environment once, not again at each request. Raises `SettingsError` where
    a file of certificates cannot be read.
    """
    # at its lowest level it logs addresses, and some of ours are capabilities
    logging.getLogger("urllib3").setLevel(logging.INFO)
    adapter = _Adapter(pool_connections=4, pool_maxsize=concurrency + _SPARE_CONNECTIONS, max_retries=0)
    session.mount("https://", adapter)
    session.mount("http://", adapter)
    session.proxies.update(get_environ_proxies(url, no_proxy=None))
    session.verify = _trusted()
    session.trust_env = False


def _trusted() -> str | bool:
    """The file (or folder) of certificates that the person named; True: those that come with requests."""
    for variable in _CERTIFICATES:
        if path := os.environ.get(variable):
            if not os.path.isdir(path):
                check_certificates(path, variable)
            return path
    return True


def network_error(error: BaseException, where: str) -> StorageError | None:
    """What a lost connection, a time-out, a wrong name or certificate is to the worker; None for anything else."""
    for cause in _chain(error):
        if isinstance(cause, SSLCertVerificationError):
            return AccessDenied(
                f"the server's certificate is not trusted: {getattr(cause, 'verify_message', 'it does not verify')}",
                where=where,
                fix="set REQUESTS_CA_BUNDLE to the certificates to trust, or correct cloud.endpoint_url",
            )
        if isinstance(cause, urllib3.exceptions.NameResolutionError):
            return TransientError(
                "the server's name cannot be resolved", where=where, fix="check cloud.endpoint_url and the network"
            )
    timeouts = (requests.Timeout, urllib3.exceptions.TimeoutError, TimeoutError)
    if any(isinstance(cause, timeouts) for cause in _chain(error)):
        return TransientError("the server did not answer in time", where=where)
    kinds = (requests.RequestException, urllib3.exceptions.HTTPError, HTTPException, OSError)
    for cause in _chain(error):
        if isinstance(cause, kinds):
            return TransientError(f"the connection failed: {_innermost(cause)}", where=where)
    return None


def _innermost(error: BaseException) -> str:
    """The last words of a chain of wrappers, without addresses and queries that may be capabilities."""
    last = list(_chain(error))[-1]
    reason = getattr(last, "strerror", None)
    return str(reason) if reason else type(last).__name__


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it wraps, whether as cause, context, argument, reason or inner exception."""
    seen: list[BaseException] = []
    while error is not None and all(error is not one for one in seen):
        seen.append(error)
        yield error
        inner = [argument for argument in error.args if isinstance(argument, BaseException)]
        reason = getattr(error, "reason", None) or getattr(error, "inner_exception", None)
        error = (
            reason if isinstance(reason, BaseException) else inner[0] if inner else error.__cause__ or error.__context__
        )
