"""Servers that ignore or refuse the conditions of a write are found out; those that heed them are not."""

import re
from collections.abc import Callable
from urllib.parse import urlsplit

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from tests.servers.proxy import Proxy
from tests.servers.s3 import ACCESS_KEY, SECRET_KEY
from wmtp_worker.errors import AccessDenied, BucketNotFound, PreconditionFailed, SettingsError
from wmtp_worker.storage.conditional import check_conditional_put
from wmtp_worker.storage.layout import RunKeys
from wmtp_worker.storage.published import Catalogue
from wmtp_worker.storage.retry import RetryingStore


class Signer(S3SigV4Auth):
    """Signs for a body that is not at hand: its digest is among the headers."""

    def payload(self, request):
        return request.headers["X-Amz-Content-SHA256"]

    def _modify_request_before_signing(self, request):
        del request.headers["Authorization"]


def without(header: str) -> Callable[[bytes], bytes]:
    """What makes of a request to S3 one that never had that header: it is signed again."""

    def rewrite(head: bytes) -> bytes:
        line, *lines = head.decode("latin-1").rstrip().split("\r\n")
        headers = dict(one.split(": ", 1) for one in lines)
        if not [name for name in headers if name.lower() == header.lower()]:
            return head
        headers = {name: value for name, value in headers.items() if name.lower() != header.lower()}
        method, path, version = line.split(" ")
        request = AWSRequest(method, f"http://{headers['Host']}{path}", headers)
        Signer(Credentials(ACCESS_KEY, SECRET_KEY), "s3", "us-east-1").add_auth(request)
        signed = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
        return f"{method} {path} {version}\r\n{signed}\r\n".encode("latin-1")

    return rewrite


@pytest.fixture
def behind():
    """`behind(server)`: a proxy before it."""
    proxies = []

    def start(server) -> Proxy:
        parts = urlsplit(server.endpoint)
        proxies.append(Proxy(parts.hostname, parts.port).__enter__())
        return proxies[-1]

    yield start
    for proxy in proxies:
        proxy.__exit__(None, None, None)


def test_every_provider_has_them(store):
    assert check_conditional_put(store, "probe-")
    assert list(store.list()) == []


def test_it_may_be_tried_again(store):
    assert check_conditional_put(RetryingStore(store, patience=5), "probe-")
    assert list(store.list()) == []


@pytest.mark.parametrize("header", ["If-None-Match", "If-Match"])
def test_a_server_that_ignores_the_header(s3_server, opened, behind, header):
    proxy = behind(s3_server)
    store = opened(s3_server, endpoint_url=proxy.endpoint)
    check_conditional_put(store, "probe-")
    proxy.rewrite = without(header)
    with pytest.raises(SettingsError, match=f"PUT with {header}: .*it ignores it") as caught:
        check_conditional_put(store, "probe-")
    assert caught.value.exit_code == 78
    assert caught.value.where == store.url
    assert list(store.list()) == []


def test_a_server_that_ignores_versions_in_deletions_is_good_enough(s3_server, opened, behind):
    proxy = behind(s3_server)
    store = opened(s3_server, endpoint_url=proxy.endpoint)
    strip = without("If-Match")
    proxy.rewrite = lambda head: strip(head) if head.startswith(b"DELETE") else head
    assert check_conditional_put(store, "probe-") is False
    assert list(store.list()) == []

    first = store.put("manifest", b"1").version
    second = store.put("manifest", b"2").version
    catalogue = Catalogue(store, RunKeys("run/"))
    with pytest.raises(PreconditionFailed):
        catalogue.delete("manifest", if_version=first)
    assert store.head("manifest").version == second
    catalogue.delete("manifest", if_version=second)
    assert list(store.list()) == []


def test_a_server_that_does_not_know_versions_in_deletions_is_good_enough(s3_server, opened, behind):
    proxy = behind(s3_server)
    store = opened(s3_server, endpoint_url=proxy.endpoint)
    body = "<?xml version='1.0'?><Error><Code>NotImplemented</Code><Message>a header of yours</Message></Error>"
    proxy.answer(501, body=body, match="^DELETE")
    assert check_conditional_put(store, "probe-") is False
    proxy.answer(501, body=body, match="^DELETE")
    Catalogue(store, RunKeys("run/")).delete("manifest", if_version=store.put("manifest", b"1").version)
    assert list(store.list()) == []


def test_a_server_that_ignores_generations(gcs_server, opened, behind):
    proxy = behind(gcs_server)
    store = opened(gcs_server, endpoint_url=proxy.endpoint)
    proxy.rewrite = lambda head: re.sub(rb"ifGenerationMatch=\d+", b"x=y", head)
    with pytest.raises(SettingsError, match="it ignores it"):
        check_conditional_put(store, "probe-")
    assert list(store.list()) == []


def test_a_server_that_does_not_know_the_header(s3_server, opened, behind):
    proxy = behind(s3_server)
    store = opened(s3_server, endpoint_url=proxy.endpoint)
    body = "<?xml version='1.0'?><Error><Code>NotImplemented</Code><Message>a header of yours</Message></Error>"
    proxy.answer(501, body=body, times=2, match="^PUT")
    with pytest.raises(SettingsError, match=r"PUT with If-None-Match: .*refuses it: .*a header of yours"):
        check_conditional_put(store, "probe-")


def test_other_trouble_stays_what_it_is(s3_server, opened):
    with pytest.raises(AccessDenied, match="from put s3://"):
        check_conditional_put(opened(s3_server, environ=s3_server.wrong_environ), "probe-")
    with pytest.raises(BucketNotFound):
        check_conditional_put(opened(s3_server, "no-such-bucket"), "probe-")
