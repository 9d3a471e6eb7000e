"""Planted secrets of every provider: they appear in no log, error, file of the run or object of the bucket."""

import json
import logging
from pathlib import Path

import pytest

from tests.kills.processes import Worker
from wmtp_worker.storage import CloudSync

SECRET = ("KEY", "SECRET", "TOKEN", "CONNECTION_STRING", "CREDENTIALS_JSON")


def secrets(environ) -> set[str]:
    """The values that must not appear, and the parts of those that have parts."""
    found = set()
    for name, value in environ.items():
        if any(word in name for word in SECRET) and not name.endswith(("_FILE", "ACCESS_KEY_ID")):
            found |= {value, *(part.partition("=")[2] for part in value.split(";") if part.startswith("AccountKey="))}
    if path := environ.get("GOOGLE_APPLICATION_CREDENTIALS"):
        found |= set(json.loads(Path(path).read_text())["private_key"].splitlines()[1:-1])
    return {value for value in found if len(value) > 5}


def files(folder: Path) -> bytes:
    return b"\n".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


@pytest.mark.slow
@pytest.mark.parametrize("provider", ["s3", "gcs", "azure"])
@pytest.mark.parametrize("refused", [False, True], ids=["accepted", "refused"])
def test_no_secret_is_written_anywhere(provider, refused, request, tiny_settings, monkeypatch, tmp_path):
    server = request.getfixturevalue(f"{provider}_server")
    environ = server.wrong_environ if refused else server.environ
    planted = secrets(environ)
    assert planted
    patience = 1 if refused else 60
    variables = {**server.variables(server.make_bucket(), patience=patience), **environ, "WMTP_LOGGING__LEVEL": "debug"}
    workdir, output = tmp_path / "work", tmp_path / "output.txt"
    workdir.mkdir()
    settings = (*tiny_settings, "training.max_steps=3")
    # forked: of the command itself only the loading of modules is left out
    worker = Worker(workdir, settings, output, variables, fork=True)
    assert worker.wait(120) == (78 if refused else 0), output.read_text()
    everything = files(tmp_path)
    if not refused:
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        with CloudSync(server.cloud(variables["WMTP_CLOUD__BUCKET"]), tmp_path / "onlooker") as cloud:
            cloud.download_directory("", tmp_path / "bucket")
        everything += files(tmp_path / "bucket")
    assert [value for value in planted if value.encode() in everything] == []


@pytest.mark.parametrize("provider", ["s3", "gcs", "azure"])
def test_no_secret_in_what_the_packages_log(provider, request, monkeypatch, tmp_path, caplog):
    server = request.getfixturevalue(f"{provider}_server")
    for name, value in server.environ.items():
        monkeypatch.setenv(name, value)
    with caplog.at_level(logging.INFO), CloudSync(server.cloud(server.make_bucket()), tmp_path) as cloud:
        (tmp_path / "file").write_text("content")
        cloud.upload_file(tmp_path / "file", "key")
        shown = repr(cloud.store) + repr(vars(cloud)) + str(cloud.store.url)
    assert [value for value in secrets(server.environ) if value in caplog.text + shown] == []
