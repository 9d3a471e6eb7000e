"""Files of certificates that cannot be used: said at once and by name, not taken for trouble with the network."""

import os
import tempfile
from pathlib import Path

import pytest

from wmtp_worker.errors import SettingsError
from wmtp_worker.storage.certificates import check_certificates


@pytest.fixture(autouse=True)
def _no_others(monkeypatch):
    """The machine that tests may need certificates of its own, for other things."""
    for variable in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def garbage(tmp_path) -> str:
    path = tmp_path / "authority.pem"
    path.write_text("no certificate\n")
    return str(path)


@pytest.mark.parametrize("variable", ["AWS_CA_BUNDLE", "SSL_CERT_FILE"])
def test_of_s3(s3_server, s3_tls_server, opened, garbage, variable):
    for path, why in ((garbage, "holds no certificates"), ("/no/such/file", "No such file")):
        store = opened(s3_tls_server, environ={**s3_server.environ, variable: path})
        for call in (lambda: store.head("key"), lambda: store.get("key"), lambda: list(store.list())):  # noqa: B023
            with pytest.raises(SettingsError, match=why) as caught:
                call()
            assert path in caught.value.what
            assert caught.value.where == variable
            assert variable in caught.value.fix


def test_of_a_profile_of_aws(s3_server, s3_tls_server, opened, garbage, tmp_path):
    (tmp_path / "config").write_text(f"[default]\nca_bundle = {garbage}\n")
    environ = {**s3_server.environ, "AWS_CONFIG_FILE": str(tmp_path / "config")}
    with pytest.raises(SettingsError, match=r"from ca_bundle"):
        opened(s3_tls_server, environ=environ).head("key")


@pytest.mark.parametrize("provider", ["gcs", "azure"])
@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"])
def test_of_the_others(request, opened, monkeypatch, garbage, tmp_path, provider, variable):
    server = request.getfixturevalue(f"{provider}_server")
    monkeypatch.setenv(variable, garbage)
    with pytest.raises(SettingsError, match="holds no certificates") as caught:
        opened(server)
    assert garbage in caught.value.what
    assert caught.value.where == variable
    # a folder of them is fine
    monkeypatch.setenv(variable, str(tmp_path))
    assert list(opened(server).list()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_one_that_is_not_ours(s3_tls_server):
    # pytest's own folders are closed to others
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        path = Path(folder) / "authority.pem"
        path.write_bytes(Path(s3_tls_server.environ["AWS_CA_BUNDLE"]).read_bytes())
        path.chmod(0o600)
        os.seteuid(65534)
        try:
            with pytest.raises(SettingsError, match=r"cannot be read: Permission denied"):
                check_certificates(str(path), "AWS_CA_BUNDLE")
        finally:
            os.seteuid(0)
        check_certificates(str(path), "AWS_CA_BUNDLE")
