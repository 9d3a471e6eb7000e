"""From settings, or a URL, to a store. A provider's package is imported only when a store of it is opened."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

from pydantic import ValidationError

from wmtp_worker.errors import SettingsError
from wmtp_worker.settings.schema import CloudSettings
from wmtp_worker.storage.objects import ObjectStore
from wmtp_worker.storage.retry import RetryingStore

_MODULES: Mapping[str, str] = MappingProxyType({"local": "directory", "s3": "s3", "gcs": "gcs", "azure": "azure"})
_SCHEMES: Mapping[str, str] = MappingProxyType(
    {"s3": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "azure": "azure", "file": "local"}
)
# what is true of one provider's bucket says nothing of another's
_OF_PROVIDER: Mapping[str, Any] = MappingProxyType(
    {"endpoint_url": None, "region": None, "sse": None, "kms_key": None, "allow_http": False}
)


def open_store(cloud: CloudSettings, check: Callable[[], None] = lambda: None) -> ObjectStore:
    """The bucket of these settings, which tries again for `cloud.patience` seconds what is in transient trouble.

    `check` is called between attempts and may raise. Nothing is sent yet: a wrong bucket or wrong credentials show at
    the first call. Raises `SettingsError` where the settings alone are wrong.
    """
    module = importlib.import_module(f"wmtp_worker.storage.{_MODULES[cloud.provider]}")
    return RetryingStore(module.open_store(cloud), patience=cloud.patience, check=check)


def open_url(url: str, cloud: CloudSettings, check: Callable[[], None] = lambda: None) -> ObjectStore:
    """The bucket of `s3://bucket/prefix`, `gs://…`, `az://container/prefix` or the folder of a path.

    The other settings are those of `cloud` if the provider is the same, or `cloud` has no bucket. Raises
    `SettingsError`.
    """
    return open_store(settings_of_url(url, cloud), check)


def settings_of_url(url: str, cloud: CloudSettings) -> CloudSettings:
    """`cloud`, with the provider, bucket and prefix of a URL. Raises `SettingsError`."""
    check_slashes(url)
    scheme, separator, rest = url.partition("://")
    if not separator:
        if not url or "\0" in url:
            raise SettingsError(f"{url!r} is no path and no URL", fix=_fix())
        return _with(cloud, url, provider="local", bucket=url, prefix="")
    if scheme not in _SCHEMES:
        raise SettingsError(f"{scheme}:// is no kind of bucket", where=_shown(url), fix=_fix())
    provider = _SCHEMES[scheme]
    if provider == "local":
        if not rest.startswith("/"):
            raise SettingsError("a file:// URL needs an absolute path", where=_shown(url), fix="write file:///folder")
        return _with(cloud, url, provider=provider, bucket=rest, prefix="")
    bucket, _, prefix = rest.partition("/")
    if not bucket or "@" in bucket or ":" in bucket:
        why = "has no bucket" if not bucket else "has more than a bucket's name in the place of the bucket"
        raise SettingsError(f"the URL {why}", where=_shown(url), fix=_fix())
    return _with(cloud, url, provider=provider, bucket=bucket, prefix=prefix)


def check_slashes(url: str) -> None:
    """Raise `SettingsError` for `s3:bucket` and `gs:/bucket`: they would be taken for folders of that name."""
    scheme, colon, rest = url.partition(":")
    if colon and scheme in _SCHEMES and not rest.startswith("//"):
        fix = f"write {scheme}://{'/' if scheme == 'file' else ''}{rest.lstrip('/')}, or ./{url} for a folder"
        raise SettingsError(f"{_shown(url)!r} is no URL: it lacks a slash", fix=fix)


def _with(cloud: CloudSettings, url: str, **changes: str) -> CloudSettings:
    # where no bucket was chosen, an endpoint can only have been meant for the URL
    meant = changes["provider"] == cloud.provider or (cloud.provider == "local" and cloud.bucket is None)
    other = {} if meant else dict(_OF_PROVIDER)
    try:
        return CloudSettings(**{**cloud.model_dump(), **other, **changes})
    except ValidationError as error:
        reasons = "; ".join(str(one["msg"]).removeprefix("Value error, ") for one in error.errors())
        raise SettingsError(f"the URL's path {reasons}", where=_shown(url), fix=_fix()) from None


def _shown(url: str) -> str:
    """The URL without what may be a password."""
    try:
        parts = urlsplit(url)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
    except ValueError:
        return url.partition("://")[0] + "://…"


def _fix() -> str:
    return "write s3://bucket/prefix, gs://bucket/prefix, az://container/prefix or a folder's path"
