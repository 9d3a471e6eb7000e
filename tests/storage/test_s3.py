"""What is S3's own: trust, endpoints, credentials, encryption, checksums, unfinished uploads, faults of the way."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from datetime import timedelta

import pytest

from tests.servers.proxy import Proxy
from tests.servers.s3 import READER_KEY, READER_SECRET
from wmtp_worker.errors import (
    AccessDenied,
    BucketNotFound,
    InputError,
    IntegrityError,
    ObjectNotFound,
    PreconditionFailed,
    SettingsError,
    StorageError,
    TransientError,
)
from wmtp_worker.settings import load
from wmtp_worker.settings.checks import is_loopback
from wmtp_worker.storage import s3_client
from wmtp_worker.storage.open import open_store, open_url, settings_of_url
from wmtp_worker.storage.retry import RetryingStore
from wmtp_worker.storage.s3_listing import read_contents

PART = 5 << 20


@pytest.fixture
def proxied(s3_server, opened):
    """`proxied(**settings)`: a store behind a proxy, and the proxy."""
    host, _, port = s3_server.endpoint.removeprefix("http://").partition(":")
    with Proxy(host, int(port)) as proxy:
        yield lambda **settings: (opened(s3_server, endpoint_url=proxy.endpoint, **settings), proxy)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source"
    path.write_bytes(os.urandom(1 << 16) * 128)
    return path


def digest(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def send(upload, path) -> None:
    data = path.read_bytes()
    for number, start in enumerate(range(0, len(data), upload.part_size)):
        upload.put(number, data[start : start + upload.part_size])


class Test_TLS:
    def test_with_the_authority_that_is_named(self, s3_tls_server, opened, source):
        store = opened(s3_tls_server)
        store.put("key", b"x")
        store.put("large", source.read_bytes())
        assert bytes(store.get("key")[1]) == b"x"
        assert bytes(store.get("large")[1]) == source.read_bytes()
        assert [info.key for info in store.list()] == ["key", "large"]

    def test_ssl_cert_file_is_as_good(self, s3_tls_server, opened):
        environ = dict(s3_tls_server.environ)
        environ["SSL_CERT_FILE"] = environ.pop("AWS_CA_BUNDLE")
        store = opened(s3_tls_server, environ=environ)
        store.put("key", b"x")
        assert store.head("key").size == 1

    def test_nobody_else_is_trusted(self, s3_server, s3_tls_server, opened):
        store = opened(s3_tls_server, environ=s3_server.environ)
        for call in (lambda: store.head("key"), lambda: store.get("key"), lambda: store.put("key", b"x")):
            with pytest.raises(AccessDenied, match=r"not trusted.*AWS_CA_BUNDLE"):
                call()

    def test_a_file_of_certificates_that_is_not_there(self, s3_tls_server, opened):
        store = opened(s3_tls_server, environ={**s3_tls_server.environ, "AWS_CA_BUNDLE": "/no/such/file"})
        with pytest.raises(SettingsError, match="/no/such/file"):
            store.head("key")

    @pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
    def test_endpoints_of_variables_need_it_too(self, s3_server, opened, name):
        environ = {**s3_server.environ, name: "http://storage.example"}
        with pytest.raises(SettingsError, match="without TLS"):
            opened(s3_server, environ=environ, endpoint_url=None).head("key")


class Test_endpoints:
    @pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
    def test_one_from_a_variable(self, s3_server, opened, name):
        store = opened(s3_server, environ={**s3_server.environ, name: s3_server.endpoint}, endpoint_url=None)
        store.put("key", b"x")
        assert store.head("key").version == store.get("key")[0].version

    def test_the_setting_wins_over_variables(self, s3_server, opened):
        other = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"}
        store = opened(s3_server, environ={**s3_server.environ, **other})
        store.put("key", b"x")
        assert store.head("key").size == 1

    @pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://no-such-host.invalid"])
    def test_nobody_there(self, s3_server, opened, endpoint):
        store = opened(s3_server, endpoint_url=endpoint, allow_http=True)
        for call in (lambda: store.head("key"), lambda: store.get("key"), lambda: store.put("key", b"x")):
            with pytest.raises(TransientError) as caught:
                call()
            assert caught.value.fix

    def test_a_virtual_host_on_aws(self, s3_server, opened, monkeypatch):
        asked = []

        def resolve(host, *rest, **more):
            asked.append(host)
            raise socket.gaierror(socket.EAI_NONAME, "no such host")

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        store = opened(s3_server, "the-bucket", endpoint_url=None, region="eu-west-3")
        with pytest.raises(TransientError):
            store.head("key")
        assert set(asked) == {"the-bucket.s3.eu-west-3.amazonaws.com"}
        objects = store._clients.objects
        assert objects.config["endpoint"] == "https://the-bucket.s3.eu-west-3.amazonaws.com"
        assert objects.config["virtual_hosted_style_request"] == "true"

    def test_the_region_comes_from_the_setting_then_the_variable(self, s3_server, opened):
        assert opened(s3_server, region="eu-west-3").control.meta.region_name == "eu-west-3"
        environ = {**s3_server.environ, "AWS_REGION": "eu-north-1"}
        assert opened(s3_server, environ=environ).control.meta.region_name == "eu-north-1"
        environ.pop("AWS_REGION")
        assert opened(s3_server, environ=environ).control.meta.region_name == "us-east-1"


class Test_credentials:
    def without(self, s3_server, **more):
        environ = {name: value for name, value in s3_server.environ.items() if "ACCESS_KEY" not in name}
        return {**environ, **more}

    def test_from_a_profile(self, s3_server, opened, tmp_path):
        environ = s3_server.environ
        file = tmp_path / "credentials"
        file.write_text(
            "[default]\naws_access_key_id = nobody\naws_secret_access_key = nothing\n"
            f"[owner]\naws_access_key_id = {environ['AWS_ACCESS_KEY_ID']}\n"
            f"aws_secret_access_key = {environ['AWS_SECRET_ACCESS_KEY']}\n"
        )
        chosen = self.without(s3_server, AWS_SHARED_CREDENTIALS_FILE=str(file), AWS_PROFILE="owner")
        store = opened(s3_server, environ=chosen)
        store.put("key", b"x")
        assert [info.key for info in store.list()] == ["key"]
        chosen.pop("AWS_PROFILE")
        with pytest.raises(AccessDenied, match="AWS_PROFILE"):
            opened(s3_server, environ=chosen).head("key")

    def test_none(self, s3_server, opened):
        store = opened(s3_server, environ=self.without(s3_server))
        for call in (lambda: store.get("key"), lambda: list(store.list()), lambda: store.put("key", b"x")):
            with pytest.raises(AccessDenied, match=r"no credentials.*AWS_ACCESS_KEY_ID"):
                call()

    @pytest.mark.parametrize(
        "more", [{"AWS_PROFILE": "nobody"}, {"AWS_ACCESS_KEY_ID": "half"}], ids=["no such profile", "half of them"]
    )
    def test_wrong_ones(self, s3_server, opened, more):
        with pytest.raises(AccessDenied, match="no credentials"):
            opened(s3_server, environ=self.without(s3_server, **more)).head("key")

    def test_ones_that_may_only_read(self, s3_server, opened, source):
        prefix = f"reader-{time.monotonic_ns()}"
        owner = opened(s3_server, prefix=prefix)
        info = owner.put("key", b"x")
        reader = {"AWS_ACCESS_KEY_ID": READER_KEY, "AWS_SECRET_ACCESS_KEY": READER_SECRET}
        store = opened(s3_server, prefix=prefix, environ={**s3_server.environ, **reader})
        assert bytes(store.get("key")[1]) == b"x"
        assert list(store.list()) == list(owner.list())
        for call in (
            lambda: store.put("key", b"y"),
            lambda: store.put("key", b"y", if_version=info.version),
            lambda: store.delete("key"),
            lambda: store.copy("key", "other"),
            lambda: store.begin("large", source.stat().st_size, digest(source), PART, None),
        ):
            with pytest.raises(AccessDenied, match="s3:PutObject"):
                call()
        assert bytes(owner.get("key")[1]) == b"x"

    @pytest.mark.parametrize(
        ("status", "code", "fix"),
        [
            (400, "ExpiredToken", "AWS_SESSION_TOKEN"),
            (403, "RequestTimeTooSkewed", "clock"),
            (403, "InvalidAccessKeyId", "AWS_ACCESS_KEY_ID"),
            (400, "AuthorizationHeaderMalformed", "AWS_REGION=eu-west-3"),
            (301, "PermanentRedirect", "AWS_REGION"),
            (400, "KMS.DisabledException", "kms_key"),
        ],
    )
    def test_refusals_say_what_to_do(self, proxied, status, code, fix):
        store, proxy = proxied()
        region = "<Region>eu-west-3</Region>" if "Malformed" in code else ""
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message>{region}</Error>"
        for call in (lambda: store.get("key"), lambda: store.put("key", b"x"), lambda: list(store.list())):
            proxy.answer(status, body=body, times=5)
            with pytest.raises(AccessDenied) as caught:
                call()
            assert fix in caught.value.fix
            proxy.heal()

    def test_a_refused_head_is_explained_too(self, proxied):
        store, proxy = proxied()
        proxy.answer(400, body="", match="^HEAD")
        body = "<?xml version='1.0'?><Error><Code>ExpiredToken</Code><Message>old</Message></Error>"
        proxy.answer(400, body=body, match="^GET")
        with pytest.raises(AccessDenied, match=r"ExpiredToken.*from head s3://.*AWS_SESSION_TOKEN"):
            store.head("key")

    def test_new_ones_are_used_when_the_old_ones_expire(self, s3_server, opened, monkeypatch):
        monkeypatch.setattr(s3_client, "_CREDENTIALS_GOOD_FOR", timedelta(seconds=-1))
        store = opened(s3_server)
        store.put("key", b"x")
        credentials = s3_client._provider
        assert credentials is not None
        frozen = store.control._request_signer._credentials
        frozen.secret_key = "another"
        assert store._clients.objects.credential_provider()["secret_access_key"] == "another"


class Test_settings:
    def test_names_of_hosts_have_no_case(self):
        assert is_loopback("LOCALHOST")
        assert not is_loopback("localhost.example.org")

    def test_encryption_is_asked_for_with_every_write(self, proxied, source):
        store, proxy = proxied(sse="AES256")
        proxy.heads.clear()
        store.put("small", b"x")
        store.put("conditional", b"x", if_absent=True)
        store.copy("small", "copied")
        upload = store.begin("large", source.stat().st_size, digest(source), PART, None)
        upload.put(0, source.read_bytes()[: upload.part_size])
        upload.put(1, source.read_bytes()[upload.part_size :])
        upload.finish()
        asked = [head for head in proxy.heads if "x-amz-server-side-encryption: aes256" in head.lower()]
        lines = [head.split("?")[0].split(" HTTP")[0].rpartition("/")[2] for head in asked]
        assert lines == ["small", "conditional", "copied", "large"]
        for key in ("small", "conditional", "copied", "large"):
            assert store.control.head_object(Bucket=store.bucket, Key=store.full_key(key))["ServerSideEncryption"]

    def test_a_kms_key(self, proxied):
        store, proxy = proxied(sse="aws:kms", kms_key="the-key")
        for condition in ({}, {"if_absent": True}):
            proxy.heads.clear()
            proxy.answer(200, body="", headers='ETag: "0123456789abcdef0123456789abcdef"\r\n', match="^PUT")
            # with KMS an ETag is no MD5, whatever it looks like
            assert store.put("key", b"x", **condition).md5 is None
            said = proxy.heads[-1].lower()
            assert "x-amz-server-side-encryption: aws:kms" in said
            assert "x-amz-server-side-encryption-aws-kms-key-id: the-key" in said

    @pytest.mark.parametrize("encrypted", ["aws:kms", "aws:kms:dsse", "AES256", None])
    def test_etags_of_what_is_encrypted_with_kms_are_no_md5(self, proxied, encrypted):
        store, proxy = proxied()
        store.put("key", b"x")
        facts = "Last-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n"
        facts += f'ETag: "{hashlib.md5(b"x").hexdigest()}"\r\n'
        facts += f"x-amz-server-side-encryption: {encrypted}\r\n" if encrypted else ""
        proxy.answer(200, body="", headers=facts, match="^HEAD")
        assert store.head("key").md5 == (hashlib.md5(b"x").hexdigest() if encrypted in ("AES256", None) else None)
        assert proxy.pending == 0
        # a listing does not tell how each is encrypted
        (listed,) = store.list()
        assert listed.md5 is None

    def test_no_session_token_in_logs(self, s3_server):
        program = (
            "import logging, sys; logging.basicConfig(level=logging.DEBUG, stream=sys.stdout)\n"
            "from wmtp_worker.settings import CloudSettings\n"
            "from wmtp_worker.storage.open import open_store\n"
            "store = open_store(CloudSettings.model_validate_json(sys.argv[1]))\n"
            "for call in (lambda: store.head('x'), lambda: store.put('x', b'1')):\n"
            "    try: call()\n"
            "    except Exception as error: print('ERROR', error)\n"
        )
        cloud = load(preset="smoke", environ={}).cloud.model_dump() | {"patience": 0}
        cloud |= {"provider": "s3", "bucket": s3_server.make_bucket(), "endpoint_url": s3_server.endpoint}
        environ = os.environ | s3_server.environ | {"AWS_SESSION_TOKEN": "p1anted-session-token"}
        done = subprocess.run(
            [sys.executable, "-c", program, json.dumps(cloud)], env=environ, capture_output=True, text=True, timeout=60
        )
        assert "ERROR" in done.stdout
        assert "p1anted-session-token" not in done.stdout + done.stderr

    def test_no_bucket(self):
        cloud = load(preset="smoke", environ={}).cloud.model_copy(update={"provider": "s3"})
        with pytest.raises(SettingsError, match="CLOUD_BUCKET"):
            open_store(cloud)

    def test_a_name_that_no_bucket_can_have(self, s3_server, opened):
        with pytest.raises(BucketNotFound, match="No Bucket!"):
            list(opened(s3_server, "No Bucket!").list())

    def test_opening_sends_nothing(self, proxied):
        store, proxy = proxied()
        assert store.url.startswith("s3://")
        assert proxy.connections == 0


REFUSED = "<?xml version='1.0'?><Error><Code>{}</Code><Message>{}</Message></Error>"


class Test_listings:
    PAGE = (
        "<?xml version='1.0' encoding='UTF-8'?><ListBucketResult{}><EncodingType>url</EncodingType>"
        "<IsTruncated>false</IsTruncated>{}</ListBucketResult>"
    )
    ONE = (
        "<Contents><Key>{}</Key><LastModified>2026-01-02T03:04:05.678Z</LastModified><ETag>{}</ETag><Size>{}</Size>"
        "<Owner><ID>x</ID></Owner><StorageClass>STANDARD</StorageClass></Contents>"
    )

    @pytest.mark.parametrize("namespace", ["", " xmlns='http://s3.amazonaws.com/doc/2006-03-01/'"])
    def test_are_read_as_boto3_reads_them(self, proxied, namespace):
        store, proxy = proxied()
        prefix = store.full_key("")
        names = ["a%2Bb%26c", "d&amp;e&#38;f", "g h", "%C3%BC%0A"]
        ones = "".join(self.ONE.format(prefix + name, "&quot;abc-2&quot;", 1 << 40) for name in names)
        listed = []
        for _ in range(2):
            proxy.answer(200, body=self.PAGE.format(namespace, ones), match="^GET")
            listed.append(list(store.list()))
            # the second time by boto3 alone
            store.control.meta.events.unregister("before-parse.s3.ListObjectsV2", read_contents)
        assert [info.key for info in listed[0]] == ["a+b&c", "d&e&f", "g h", "ü\n"]
        assert listed[0] == listed[1]
        assert {(info.size, info.version) for info in listed[0]} == {(1 << 40, "abc-2")}
        assert listed[0][0].modified.isoformat() == "2026-01-02T03:04:05.678000+00:00"

    @pytest.mark.parametrize("size", ["many", ""])
    def test_what_is_no_listing_is_an_error(self, proxied, size):
        store, proxy = proxied()
        whole = self.PAGE.format("", self.ONE.format(store.full_key("a"), "e", 1))
        bodies = (whole[:-30], "<html>", self.PAGE.format("", self.ONE.format(store.full_key("a"), "e", size)))
        for body in bodies:
            proxy.answer(200, body=body, match="^GET")
            with pytest.raises(TransientError, match=r"it is no listing|says 500"):
                list(store.list())
            assert proxy.pending == 0


class Test_checksums:
    @pytest.mark.parametrize(
        ("status", "code", "message"),
        [
            (501, "NotImplemented", "A header you provided implies functionality that is not implemented"),
            (400, "InvalidArgument", "Unsupported header 'x-amz-checksum-sha256' received for this API call."),
        ],
    )
    def test_auto_takes_md5_where_a_server_refuses_better_ones(self, proxied, source, status, code, message):
        for write in (
            lambda store: store.put("key", b"x"),
            lambda store: store.put("other", b"x", if_absent=True),
            lambda store: send(store.begin("large", source.stat().st_size, digest(source), PART, None), source),
        ):
            store, proxy = proxied(checksum="auto")
            proxy.answer(status, body=REFUSED.format(code, message), match="^P")
            write(store)
            assert proxy.pending == 0
            assert store.md5
            proxy.heads.clear()
            store.put("again", b"x")
            assert "content-md5:" in proxy.heads[-1].lower()
            assert "x-amz-checksum" not in proxy.heads[-1].lower()

    def test_sha256_is_not_given_up_when_it_is_asked_for(self, proxied):
        store, proxy = proxied(checksum="sha256")
        proxy.answer(501, body=REFUSED.format("NotImplemented", "no such header"))
        with pytest.raises(StorageError, match=r"cloud\.checksum"):
            store.put("key", b"x")
        assert not store.md5

    @pytest.mark.parametrize("checksum", ["auto", "md5"])
    def test_bytes_changed_on_the_way_up_are_noticed(self, proxied, source, checksum):
        store, proxy = proxied(checksum=checksum)
        upload = store.begin("large", source.stat().st_size, digest(source), PART, None)
        for call in (
            lambda: store.put("small", b"x" * 1000),
            lambda: store.put("conditional", b"x" * 1000, if_absent=True),
            lambda: upload.put(0, source.read_bytes()[: upload.part_size]),
        ):
            proxy.flip("up", 100)
            with pytest.raises(TransientError):
                call()
            assert proxy.pending == 0
        assert list(store.list()) == []

    def test_a_whole_upload_with_md5(self, proxied, source):
        store, _ = proxied(checksum="md5")
        upload = store.begin("large", source.stat().st_size, digest(source), PART, None)
        upload.put(0, source.read_bytes()[: upload.part_size])
        upload.put(1, source.read_bytes()[upload.part_size :])
        assert upload.finish().sha256 == digest(source)
        assert bytes(store.get("large")[1]) == source.read_bytes()

    def test_an_upload_that_was_begun_with_md5_is_finished(self, proxied, source):
        store, proxy = proxied(checksum="md5")
        upload = store.begin("large", source.stat().st_size, digest(source), PART, None)
        upload.put(0, source.read_bytes()[: upload.part_size])
        upload.put(1, source.read_bytes()[upload.part_size :])
        other, _ = proxied(prefix=store.url.rpartition("/")[2])
        upload = other.begin("large", source.stat().st_size, digest(source), PART, None)
        assert upload.has(0, source.read_bytes()[: upload.part_size])
        assert upload.has(1, source.read_bytes()[upload.part_size :])
        proxy.answer(400, body=REFUSED.format("InvalidRequest", "no checksum was asked for"), match="^POST")
        assert upload.finish().sha256 == digest(source)
        assert proxy.pending == 0


class Test_unfinished_uploads:
    def names(self, store) -> list[str]:
        return [upload["Key"].removeprefix(store.full_key("")) for upload in store.unfinished("")]

    def test_they_are_listed_and_swept(self, s3_server, opened, source):
        store = opened(s3_server)
        for key in ("a/one", "a/two", "b/three"):
            store.begin(key, source.stat().st_size, digest(source), PART, None)
        assert sorted(self.names(store)) == ["a/one", "a/two", "b/three"]
        assert store.sweep("", timedelta(hours=1)) == 0
        time.sleep(1.1)
        assert store.sweep("a/", timedelta(0)) == 2
        assert self.names(store) == ["b/three"]
        assert store.sweep("", timedelta(0)) == 1
        assert self.names(store) == []

    def test_one_of_a_file_whose_end_has_changed_is_left_alone(self, s3_server, opened, source):
        store = opened(s3_server)
        old_size = source.stat().st_size
        old = store.begin("large", old_size, digest(source), PART, None)
        first = source.read_bytes()[: old.part_size]
        old.put(0, first)
        source.write_bytes(source.read_bytes() + b"another end")
        new = store.begin("large", source.stat().st_size, digest(source), PART, None)
        assert new.token["upload"] != old.token["upload"]
        old.put(1, bytes(old_size - old.part_size))
        send(new, source)
        assert new.finish().sha256 == digest(source)
        assert store.head("large").sha256 == digest(source)
        assert bytes(store.get("large")[1]) == source.read_bytes()

    @pytest.mark.parametrize("checksum", [{}, {"ChecksumAlgorithm": "SHA256"}, {"ChecksumAlgorithm": "CRC32C"}])
    def test_one_of_another_tool_is_left_alone(self, s3_server, opened, source, checksum):
        store, data = opened(s3_server), source.read_bytes()
        names = {"Bucket": store.bucket, "Key": store.full_key("large")}
        theirs = store.control.create_multipart_upload(**names, **checksum)["UploadId"]
        etags = []
        for number, body in enumerate((data[:PART], data[PART:]), start=1):
            said = store.control.upload_part(**names, UploadId=theirs, PartNumber=number, Body=body)
            etags.append(said["ETag"])
        upload = store.begin("large", len(data), digest(source), PART, None)
        assert upload.token["upload"] != theirs
        send(upload, source)
        upload.abort()
        # theirs is as it was
        there = store.control.list_parts(**names, UploadId=theirs)["Parts"]
        assert [part["ETag"] for part in there] == etags
        store.control.abort_multipart_upload(**names, UploadId=theirs)

    def test_one_begun_for_other_checksums_is_neither_taken_up_nor_swept(self, proxied, source):
        store, proxy = proxied()
        listed = (
            "<?xml version='1.0'?><ListMultipartUploadsResult><IsTruncated>false</IsTruncated><Upload>"
            f"<Key>{store.full_key('large')}</Key><UploadId>theirs</UploadId><Initiated>2020-01-01T00:00:00.000Z"
            "</Initiated>{}</Upload></ListMultipartUploadsResult>"
        )
        for kinds in (
            "<ChecksumAlgorithm>CRC64NVME</ChecksumAlgorithm><ChecksumType>FULL_OBJECT</ChecksumType>",
            "<ChecksumAlgorithm>CRC32C</ChecksumAlgorithm><ChecksumType>FULL_OBJECT</ChecksumType>",
            "<ChecksumAlgorithm>SHA256</ChecksumAlgorithm><ChecksumType>COMPOSITE</ChecksumType>",
        ):
            proxy.answer(200, body=listed.format(kinds), match="^GET", times=2)
            proxy.heads.clear()
            upload = store.begin("large", source.stat().st_size, digest(source), PART, None)
            assert store.sweep("", timedelta(0)) == 0
            assert proxy.pending == 0
            assert not [head for head in proxy.heads if "theirs" in head]
            upload.abort()

    def test_parts_that_somebody_else_has_replaced(self, proxied, source):
        store, proxy = proxied()
        upload = store.begin("large", source.stat().st_size, digest(source), PART, None)
        send(upload, source)
        # SeaweedFS does not look
        proxy.answer(400, body=REFUSED.format("InvalidPart", "not found, or another ETag"), match="^POST")
        with pytest.raises(IntegrityError, match="somebody else's parts"):
            upload.finish()
        assert list(store.list()) == []
        upload.abort()

    def test_one_of_a_longer_key_is_not_ours(self, s3_server, opened, source):
        store = opened(s3_server)
        other = store.begin("large-other", source.stat().st_size, digest(source), PART, None)
        other.put(0, source.read_bytes()[: other.part_size])
        assert (
            store.begin("large", source.stat().st_size, digest(source), PART, None).token["upload"]
            != other.token["upload"]
        )

    def test_two_workers_that_send_the_same_file_both_succeed(self, s3_server, opened, source):
        store = opened(s3_server)
        data = source.read_bytes()
        first = store.begin("large", source.stat().st_size, digest(source), PART, None)
        size = first.part_size
        first.put(0, data[:size])
        second = store.begin("large", source.stat().st_size, digest(source), PART, None)
        assert second.token["upload"] == first.token["upload"]
        assert second.has(0, data[:size])
        first.put(1, data[size:])
        assert first.finish().sha256 == digest(source)
        second.put(1, data[size:])
        assert second.finish().sha256 == digest(source)

    def test_who_may_not_list_them_begins_anew(self, proxied, source):
        store, proxy = proxied()
        upload = store.begin("large", source.stat().st_size, digest(source), PART, None)
        upload.put(0, source.read_bytes()[: upload.part_size])
        for token in (None, upload.token):
            body = "<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>no</Message></Error>"
            proxy.answer(403, body=body, match="^GET", times=1 + (token is not None))
            other = store.begin("large", source.stat().st_size, digest(source), PART, token)
            assert proxy.pending == 0
            assert other.token["upload"] != upload.token["upload"]
            other.abort()

    def test_parts_are_large_enough_for_the_limits(self, s3_server, opened, tmp_path):
        huge = tmp_path / "huge"
        with huge.open("wb") as file:
            file.truncate(200 << 30)
        store = opened(s3_server)
        upload = store.begin("huge", huge.stat().st_size, "00", 1, None)
        assert upload.part_size * 10_000 >= huge.stat().st_size
        upload.abort()
        small = store.begin("small", huge.stat().st_size, "00", 64 << 20, None)
        assert 64 << 20 < small.part_size <= 65 << 20
        small.abort()


class Test_faults_of_the_way:
    @pytest.mark.parametrize("fault", ["cut", "reset", "busy", "failing", "lost"])
    def test_are_transient(self, proxied, source, fault):
        store, proxy = proxied()
        data = source.read_bytes()
        store.put("key", data[: 1 << 18])
        upload = store.begin("large", source.stat().st_size, digest(source), PART, None)
        make = {
            "cut": lambda method: proxy.cut("up" if method == "PUT" else "down", 1000, match=method),
            "reset": lambda method: proxy.cut("up" if method == "PUT" else "down", 1000, reset=True, match=method),
            "busy": lambda method: proxy.answer(503, match=method),
            "failing": lambda method: proxy.answer(500, match=method),
            "lost": lambda method: proxy.lose_response(match=method),
        }[fault]
        for method, call in (
            ("GET", lambda: store.get("key")),
            ("PUT", lambda: store.put("key", data[: 1 << 18])),
            ("PUT", lambda: store.put("other", data[: 1 << 18], if_absent=True)),
            ("PUT", lambda: upload.put(0, data[:PART])),
        ):
            make(method)
            with pytest.raises(TransientError):
                call()
            assert proxy.pending == 0
        assert bytes(store.get("key")[1]) == data[: 1 << 18]

    def test_a_stalled_connection_is_given_up(self, proxied, monkeypatch):
        monkeypatch.setattr(s3_client, "READ_SECONDS", 0.5)
        store, proxy = proxied()
        store.put("key", b"x" * 100_000)
        for direction, match, call in (
            ("down", "^GET", lambda: store.get("key")),
            ("up", "^PUT", lambda: store.put("key", b"y" * 100_000)),
            ("up", "^PUT", lambda: store.put("other", b"y" * 100_000, if_absent=True)),
        ):
            proxy.stall(direction, 1000, match=match)
            began = time.monotonic()
            with pytest.raises(TransientError):
                call()
            assert time.monotonic() - began < 5
            assert proxy.pending == 0

    def test_a_bucket_that_disappears(self, s3_server, opened, seaweed):
        bucket = s3_server.make_bucket()
        store = opened(s3_server, bucket)
        store.put("key", b"x")
        client = seaweed.client()
        client.delete_object(Bucket=bucket, Key="key")
        client.delete_bucket(Bucket=bucket)
        client.close()
        for call in (
            lambda: store.head("key"),
            lambda: store.get("key"),
            lambda: store.put("key", b"x"),
            lambda: list(store.list()),
        ):
            with pytest.raises(BucketNotFound, match=bucket):
                call()

    def test_a_server_that_lists_in_no_order(self, proxied):
        store, proxy = proxied()
        store.control  # noqa: B018
        facts = "<Size>1</Size><ETag>x</ETag><LastModified>2026-01-01T00:00:00Z</LastModified>"
        entry = f"<Contents><Key>{{}}</Key>{facts}</Contents>"
        entries = "".join(entry.format(store.full_key(key)) for key in ("b", "a"))
        proxy.answer(200, body=f"<?xml version='1.0'?><ListBucketResult>{entries}</ListBucketResult>")
        with pytest.raises(StorageError, match="no order"):
            list(store.list())


class Test_opening:
    def test_from_settings_it_tries_again(self, s3_server, use_environ):
        use_environ(s3_server.environ)
        bucket = s3_server.make_bucket()
        store = open_store(s3_server.cloud(bucket, prefix="team"))
        assert isinstance(store, RetryingStore)
        store.put("key", b"x")
        store.close()
        store = open_url(f"s3://{bucket}/team/", s3_server.cloud("other"))
        assert [info.key for info in store.list()] == ["key"]
        assert store.url == f"s3://{bucket}/team"
        store.close()

    def test_what_is_said_of_one_provider_is_not_said_of_another(self, s3_server):
        cloud = s3_server.cloud("bucket", sse="AES256", region="eu-west-3", patience=7)
        same = settings_of_url("s3://other/a/b", cloud)
        assert (same.bucket, same.prefix, same.endpoint_url, same.sse) == ("other", "a/b", s3_server.endpoint, "AES256")
        other = settings_of_url("gs://other", cloud)
        assert (other.provider, other.bucket, other.prefix) == ("gcs", "other", "")
        assert (other.endpoint_url, other.sse, other.region, other.patience) == (None, None, None, 7)
        path = settings_of_url("some/folder", cloud)
        assert (path.provider, path.bucket, path.prefix) == ("local", "some/folder", "")
        assert settings_of_url("file:///some/folder", cloud).bucket == "/some/folder"
        assert settings_of_url("az://container/x", cloud).provider == "azure"

    @pytest.mark.parametrize(
        "url", ["", "s3://", "s3:///key", "ftp://host/x", "https://host/x", "s3://bucket/../x", "file://host/x", "a\0b"]
    )
    def test_what_is_no_url(self, s3_server, url):
        with pytest.raises(SettingsError) as caught:
            settings_of_url(url, s3_server.cloud("bucket"))
        assert caught.value.fix

    def test_credentials_in_a_url_are_refused_and_not_repeated(self, s3_server):
        with pytest.raises(SettingsError) as caught:
            settings_of_url("s3://key:sesame@bucket/x", s3_server.cloud("bucket"))
        assert "sesame" not in f"{caught.value} {caught.value!r}"


def test_odd_ends(s3_server, opened):
    store = opened(s3_server)
    with pytest.raises(InputError):
        store.put("x" * 1025, b"x")
    version = store.put("key", b"x").version
    store.delete("key")
    with pytest.raises(PreconditionFailed):
        store.put("key", b"y", if_version=version)
    with pytest.raises(ObjectNotFound, match="from copy s3://"):
        store.copy("key", "other")
