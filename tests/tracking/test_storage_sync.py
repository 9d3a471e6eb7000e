"""`scripts/sync_to_vessl_storage.py`, with a real MLflow server."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers.proxy import Proxy

# one server for all of them
pytestmark = pytest.mark.xdist_group("mlflow")

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "sync_to_vessl_storage.py"


def sync(folder, *arguments):
    command = [sys.executable, str(SCRIPT), str(folder), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder.parent, env=os.environ)


def test_a_copy_is_compared_and_told(logged_in, tmp_path, monkeypatch):
    server, folder, volume = logged_in, tmp_path / "models", tmp_path / "volume"
    (folder / "one").mkdir(parents=True)
    (folder / "one" / "weights").write_bytes(b"w" * 1000)
    (folder / "config.json").write_text("{}")

    dry = sync(folder, volume, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "one/weights" in dry.stdout
    assert not (volume / "one" / "weights").exists()

    done = sync(folder, volume)
    assert done.returncode == 0, done.stderr
    assert (volume / "one" / "weights").read_bytes() == b"w" * 1000
    runs = "select status, value from runs join tags using (run_uuid) where key = 'storage_sync'"
    assert server.query(runs) == [["FINISHED", "True"]]

    (volume / "config.json").unlink()
    (volume / "config.json").mkdir()  # where a file is to go
    (volume / "config.json" / "in the way").touch()
    with Proxy("127.0.0.1", server.port) as proxy:
        proxy.answer(500, times=9, match="set-tag")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.endpoint)
        failed = sync(folder, volume)
        assert proxy.pending < 9
    assert failed.returncode not in (0, 1), failed.stderr
    assert "was not told" in failed.stderr
    assert "\nerror: " in failed.stderr
    assert sorted(server.query(runs)) == [["FAILED", "False"], ["FINISHED", "True"]]
