"""How S3 is reached: trust, endpoints, credentials, encryption."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from datetime import timedelta

import pytest

from tests.servers.s3 import READER_KEY, READER_SECRET
from tests.storage.s3.conftest import PART, digest
from wmtp_worker.errors import AccessDenied, BucketNotFound, SettingsError, TransientError
from wmtp_worker.settings import load
from wmtp_worker.settings.checks import is_loopback
from wmtp_worker.storage import s3_client
from wmtp_worker.storage.open import open_store


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
            [sys.executable, "-c", program, json.dumps(cloud)], env=environ, capture_output=True, text=True, timeout=180
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
