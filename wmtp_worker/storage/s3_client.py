"""The two clients of one S3 bucket: botocore for credentials, control and parts, obstore for the other bytes.

botocore is boto3 without its long imports; it spends milliseconds of CPU on a request, obstore tenths. Both use the
same credentials, endpoint, region, trust and time-outs, and neither tries anything again.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import botocore.auth
import botocore.config
import botocore.exceptions
import botocore.httpsession
import botocore.loaders
import botocore.session
from botocore.handlers import convert_body_to_file_like_object
from obstore.store import S3Store as Objects

from wmtp_worker.errors import SettingsError
from wmtp_worker.settings.checks import is_loopback
from wmtp_worker.settings.schema import CloudSettings
from wmtp_worker.storage.certificates import check_certificates
from wmtp_worker.storage.s3_errors import no_credentials, translated
from wmtp_worker.storage.s3_listing import read_contents, timestamp

if TYPE_CHECKING:
    from botocore.credentials import Credentials
    from obstore.store import ClientConfig, S3Credential

CONNECT_SECONDS = 10
# without a byte sent or received
READ_SECONDS = 60
# of a whole request: none worth the name
_LONGEST = timedelta(days=1)
# reading what botocore knows of S3 takes longer than everything else about a client: once for all
_MODELS = botocore.loaders.create_loader()
# our name for `UnsignedPayload` among botocore's signature versions
_UNSIGNED_PAYLOAD = "s3v4-unsigned-payload"
# botocore renews what has less than 15 minutes left, so these are always good for that long
_CREDENTIALS_GOOD_FOR = timedelta(minutes=5)


class UnsignedPayload(botocore.auth.S3SigV4Auth):
    """AWS's signature version 4 without a digest of the body: the signed headers have its checksum already.

    Source: "Signature Calculations for the Authorization Header", UNSIGNED-PAYLOAD (Amazon S3 API Reference). A digest
    more would cost a second of CPU for each gigabyte.
    """

    def payload(self, request: Any) -> str:
        """What stands for the body in what is signed."""
        return "UNSIGNED-PAYLOAD"


botocore.auth.AUTH_TYPE_MAPS[_UNSIGNED_PAYLOAD] = UnsignedPayload


class S3Clients:
    """Both clients, made when they are first used: looking for credentials may ask the network.

    `where` is the bucket's URL. Raises `SettingsError` where the settings alone are wrong.
    """

    def __init__(self, cloud: CloudSettings, bucket: str, where: str) -> None:
        self._cloud = cloud
        self._bucket = bucket
        self._where = where
        self._lock = threading.Lock()
        self._control: Any = None
        self._objects: Objects | None = None

    @property
    def control(self) -> Any:
        """The botocore client."""
        if self._control is None:
            self._open()
        return self._control

    @property
    def objects(self) -> Objects:
        """The obstore store of the whole bucket."""
        if self._objects is None:
            self._open()
        assert self._objects is not None
        return self._objects

    def close(self) -> None:
        """Give back the connections of both."""
        with self._lock:
            if self._control is not None:
                self._control.close()
            self._control = self._objects = None

    def _open(self) -> None:
        with self._lock:
            if self._objects is not None:
                return
            # at their lowest levels they log requests, session tokens and all
            for name in ("botocore", "s3transfer", "urllib3"):
                logging.getLogger(name).setLevel(logging.INFO)
            try:
                core = botocore.session.Session()
                core.register_component("data_loader", _MODELS)
                core.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=timestamp)
                credentials = core.get_credentials()
            except botocore.exceptions.BotoCoreError as error:
                raise translated(error, self._where, self._bucket) from error
            if credentials is None:
                raise no_credentials(self._where, "none are set")
            trusted = _trusted(core)
            control = self._botocore(core, trusted, "path" if self._cloud.endpoint_url else "virtual")
            if not _is_aws(control.meta.endpoint_url) and not self._cloud.endpoint_url:
                # named by a variable or a profile: a bucket's own host name needs AWS's DNS
                control.close()
                control = self._botocore(core, trusted, "path")
            _check_tls(control.meta.endpoint_url, self._cloud)
            self._objects = self._obstore(control, credentials, trusted)
            self._control = control

    def _botocore(self, session: botocore.session.Session, trusted: str | None, style: str) -> Any:
        cloud = self._cloud
        config = botocore.config.Config(
            connect_timeout=CONNECT_SECONDS,
            read_timeout=READ_SECONDS,
            retries={"total_max_attempts": 1},
            max_pool_connections=max(10, cloud.concurrency),
            # other servers than AWS refuse the checksums that botocore adds by itself
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"addressing_style": style},  # type: ignore[arg-type]
        )
        # botocore does not read AWS_REGION, which containers set
        region = cloud.region or os.environ.get("AWS_REGION") or session.get_config_variable("region") or "us-east-1"
        try:
            client = session.create_client(
                "s3", region_name=region, endpoint_url=cloud.endpoint_url, verify=trusted, config=config
            )
        except (botocore.exceptions.BotoCoreError, ValueError) as error:
            fix = "check CLOUD_ENDPOINT_URL, AWS_REGION and AWS_PROFILE"
            raise SettingsError(f"no client for S3: {error}", where=self._where, fix=fix) from error
        client.meta.events.register("before-parse.s3.ListObjectsV2", read_contents)
        for operation in ("PutObject", "UploadPart"):
            client.meta.events.register_first(f"choose-signer.s3.{operation}", _signer)  # type: ignore[arg-type]
            # bytes are sent at once; a file, which this would make of them, in small pieces after a "continue"
            client.meta.events.unregister(f"before-parameter-build.s3.{operation}", convert_body_to_file_like_object)
        return client

    def _obstore(self, control: Any, credentials: Credentials, trusted: str | None) -> Objects:
        endpoint = control.meta.endpoint_url
        # dots in a bucket's name do not fit AWS's certificates
        virtual = control.meta.config.s3["addressing_style"] != "path" and "." not in self._bucket
        if virtual:
            parts = urlsplit(endpoint)
            endpoint = parts._replace(netloc=f"{self._bucket}.{parts.netloc}").geturl()
        options: ClientConfig = {
            "allow_http": endpoint.startswith("http://"),
            "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
            "read_timeout": timedelta(seconds=READ_SECONDS),
            "timeout": _LONGEST,
        }
        if not options["allow_http"]:
            options["root_certificate"] = _certificates(trusted)
        config: dict[str, Any] = {
            # both names: the second one would otherwise come from the environment
            "endpoint": endpoint,
            "aws_endpoint_url_s3": endpoint,
            "region": control.meta.region_name,
            "virtual_hosted_style_request": virtual,
            "skip_signature": False,
            "checksum_algorithm": "SHA256",
        }
        if self._cloud.sse is not None:
            config["server_side_encryption"] = self._cloud.sse
        if self._cloud.kms_key is not None:
            config["sse_kms_key_id"] = self._cloud.kms_key
        return Objects(
            self._bucket,
            config=config,  # type: ignore[arg-type]
            client_options=options,
            retry_config={"max_retries": 0},
            credential_provider=_provider(credentials),
        )


def _signer(signature_version: str, **_: Any) -> str | None:
    """The signature version of a request that carries a body; None: the one that botocore chose."""
    return _UNSIGNED_PAYLOAD if signature_version in ("v4", "s3v4") else None


def _is_aws(endpoint: str) -> bool:
    host = urlsplit(endpoint).hostname or ""
    return host.endswith((".amazonaws.com", ".amazonaws.com.cn"))


def _provider(credentials: Credentials) -> Callable[[], S3Credential]:
    def provide() -> S3Credential:
        frozen = credentials.get_frozen_credentials()
        assert frozen.access_key is not None
        assert frozen.secret_key is not None
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + _CREDENTIALS_GOOD_FOR,
        }

    return provide


def _trusted(session: botocore.session.Session) -> str | None:
    """The file of certificates that the person named, in the ways that AWS's and other tools know."""
    named: dict[str, str | None] = {name: os.environ.get(name) for name in ("AWS_CA_BUNDLE", "SSL_CERT_FILE")}
    named["ca_bundle"] = session.get_config_variable("ca_bundle")
    for variable, path in named.items():
        if path:
            check_certificates(path, variable)
            return path
    return None


def _certificates(trusted: str | None) -> bytes:
    # botocore's own list where none is named, so that both trust the same
    path = trusted or botocore.httpsession.get_cert_path(True)
    assert path is not None
    return Path(path).read_bytes()


def _check_tls(endpoint: str, cloud: CloudSettings) -> None:
    # cloud.endpoint_url was looked at with the settings, but variables and profiles of AWS's name endpoints too
    parts = urlsplit(endpoint)
    if parts.scheme != "https" and not is_loopback(parts.hostname or "") and not cloud.allow_http:
        fix = "use https://, or set cloud.allow_http=true if the network between is yours"
        raise SettingsError(f"the endpoint {endpoint} is without TLS", where="AWS_ENDPOINT_URL", fix=fix)
