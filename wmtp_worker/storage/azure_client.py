"""From settings and the environment to a client of one container."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import requests
from azure.core.pipeline.transport import RequestsTransport
from azure.storage.blob import ContainerClient

from wmtp_worker.errors import AccessDenied, SettingsError
from wmtp_worker.settings.checks import is_loopback
from wmtp_worker.settings.schema import CloudSettings
from wmtp_worker.storage.azure_errors import CREDENTIALS
from wmtp_worker.storage.http import prepare_session

if TYPE_CHECKING:
    from azure.core.credentials import TokenCredential

_SUFFIX = ".blob.core.windows.net"
# larger than any part or small object: each is one request
_ONE_REQUEST = 1 << 32


def open_client(cloud: CloudSettings) -> ContainerClient:
    """A client of the container `cloud.bucket` that tries everything once and logs nothing.

    Sends nothing yet. Raises `SettingsError` and `AccessDenied` where the settings or variables alone are wrong.
    """
    if cloud.bucket is None:
        raise SettingsError("no container is set", where="cloud.bucket", fix="set CLOUD_BUCKET")
    where = f"open az://{cloud.bucket}"
    # at its lower levels the SDK logs every request
    logging.getLogger("azure").setLevel(logging.ERROR)
    session = requests.Session()
    options: dict[str, Any] = {
        "transport": RequestsTransport(session=session),
        "retry_total": 0,
        "max_single_put_size": _ONE_REQUEST,
        "max_single_get_size": _ONE_REQUEST,
    }
    client = _client(cloud, cloud.bucket, where, options)
    prepare_session(session, client.primary_endpoint, cloud.concurrency)
    # the transport would overrule the session
    options["transport"].connection_config.verify = session.verify
    return client


def _client(cloud: CloudSettings, container: str, where: str, options: dict[str, Any]) -> ContainerClient:
    connection = os.environ.get("AZURE_STORAGE_CONNECTION_STRING")
    try:
        if connection:
            _check_names(connection)
            # of two settings of one name the later is taken
            chosen = f"{connection.rstrip(';')};BlobEndpoint={cloud.endpoint_url}" if cloud.endpoint_url else connection
            client = ContainerClient.from_connection_string(chosen, container, **options)
        else:
            address = _address(cloud, where)
            client = ContainerClient(address, container, credential=_credential(address, where), **options)
    # the cause may quote the connection string or the key
    except ValueError:
        name = "AZURE_STORAGE_CONNECTION_STRING" if connection else "the address of the account, or its credential,"
        raise AccessDenied(f"{name} is not what it should be", where=where, fix=CREDENTIALS) from None
    _require_tls(client.primary_endpoint, cloud)
    return client


def _check_names(connection: str) -> None:
    """Raise `ValueError` for a connection string without credentials, which the SDK would take for a public account."""
    names = {setting.partition("=")[0].strip().lower() for setting in connection.split(";")}
    if not ({"accountname", "accountkey"} <= names or names & {"sharedaccesssignature", "usedevelopmentstorage"}):
        raise ValueError("no credentials")


def _address(cloud: CloudSettings, where: str) -> str:
    """The account's address. Servers on loopback have the account's name in the path."""
    account = os.environ.get("AZURE_STORAGE_ACCOUNT")
    if cloud.endpoint_url is None:
        if not account:
            raise AccessDenied("no storage account is set", where=where, fix=CREDENTIALS)
        return f"https://{account}{_SUFFIX}"
    parts = urlsplit(cloud.endpoint_url)
    if account and is_loopback(parts.hostname or "") and not parts.path.strip("/"):
        return f"{cloud.endpoint_url.rstrip('/')}/{account}"
    return cloud.endpoint_url


def _credential(address: str, where: str) -> dict[str, str] | str | TokenCredential:
    key, sas = os.environ.get("AZURE_STORAGE_KEY"), os.environ.get("AZURE_STORAGE_SAS_TOKEN")
    if key:
        parts = urlsplit(address)
        named = parts.path.strip("/") or (parts.hostname or "").partition(".")[0]
        return {"account_name": os.environ.get("AZURE_STORAGE_ACCOUNT") or named, "account_key": key}
    if sas:
        return sas.lstrip("?")
    if urlsplit(address).scheme != "https":
        raise AccessDenied("there are no Azure credentials for a server without TLS", where=where, fix=CREDENTIALS)
    from azure.identity import DefaultAzureCredential

    return DefaultAzureCredential()


def _require_tls(address: str, cloud: CloudSettings) -> None:
    parts = urlsplit(address)
    if parts.scheme == "http" and not is_loopback(parts.hostname or "") and not cloud.allow_http:
        fix = "use https://, or set cloud.allow_http=true if the network between is yours"
        raise SettingsError(f"{parts.hostname} is to be used without TLS", where="the Azure account's address", fix=fix)
