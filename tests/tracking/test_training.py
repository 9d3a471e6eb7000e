"""Whole runs and commands with a real MLflow server."""

import json
import shutil
import subprocess

import pytest

from tests.conftest import TINY_RUN
from tests.servers.mlflow import PROGRAM, need
from tests.tracking.test_server import run_id, status
from tests.training.stopping import StopAfter
from wmtp_worker.checkpoint.manifest import read_manifest
from wmtp_worker.cli import main
from wmtp_worker.errors import Interrupted
from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.tracking.metrics import read

# one server for all of them
pytestmark = pytest.mark.xdist_group("mlflow")

PLANTED = {
    "AWS_SECRET_ACCESS_KEY": "planted-secret-of-aws",
    "AZURE_STORAGE_KEY": "planted-secret-of-azure",
    "HF_TOKEN": "planted-secret-of-the-hub",
    "GOOGLE_APPLICATION_CREDENTIALS_JSON": '{"private_key": "planted-secret-of-google"}',
}


def everything(folder) -> bytes:
    return b"\n".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_a_run_that_was_stopped_is_one_run_with_all_of_it(tiny_run, logged_in, tmp_path, monkeypatch):
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    server, paths = logged_in, RunPaths(tmp_path, TINY_RUN)
    overrides = (
        f"tracking.uri={server.uri}",
        f"tracking.tags=note={PLANTED['AWS_SECRET_ACCESS_KEY']}",
        "tracking.best_model=move",
        "tracking.model_version=v7",
        "tracking.experiment_prefix=tests",
        "tracking.system_seconds=0.2",
    )
    with pytest.raises(Interrupted):
        tiny_run(tmp_path, *overrides, stop=StopAfter(15))
    run = run_id(paths, server.uri)
    assert status(server, run) == "KILLED"
    (paths.logs / "predictions.jsonl").write_text(json.dumps({"text": PLANTED["HF_TOKEN"]}) + "\n")
    tiny_run(tmp_path, *overrides)
    assert run_id(paths, server.uri) == run
    assert status(server, run) == "FINISHED"
    assert read_manifest(paths.step(12)).tracking_run_id == run

    metrics = server.metrics(run)
    assert metrics["loss"] == metrics["weight_entropy"] == metrics["head_loss_2"] == list(range(1, 13))
    assert metrics["validation_loss"] == [line["step"] for line in read(paths.metrics) if line["kind"] == "validation"]
    assert metrics["system/cpu_utilization_percentage"]
    tags = dict(server.query(f"select key, value from tags where run_uuid = '{run}'"))
    assert {"algo": "uniform", "horizon": "2", "model_version": "v7", "note": "***"}.items() <= tags.items()
    params = dict(server.query(f"select key, value from params where run_uuid = '{run}'"))
    assert params["training.max_steps"] == "12"
    assert len(params["data.dataset.sha256"]) == 64
    name = "select experiments.name from experiments join runs using (experiment_id) where run_uuid"
    assert server.query(f"{name} = '{run}'") == [["tests/baseline"]]

    [folder] = server.folder.glob(f"artifacts/*/{run}/artifacts")
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"logs/training.log", "predictions/predictions.jsonl"} <= files
    assert {"checkpoints/checkpoints.json", "checkpoints/best_model.pt"} <= files
    assert json.loads((folder / "checkpoints/checkpoints.json").read_text())["steps"][-1] == "step_12"
    assert not paths.best.exists()

    (paths.logs / "predictions.jsonl").unlink()  # where the secret was planted
    address = ("-h", "127.0.0.1", "-p", str(server.postgres_port), "-U", "postgres")
    dump = subprocess.run([need("pg_dump"), *address, "postgres"], capture_output=True, check=True, timeout=60).stdout
    written = dump + everything(folder) + everything(tmp_path)
    assert run.encode() in dump
    secrets = [*PLANTED.values(), "planted-secret-of-google", server.environ["MLFLOW_TRACKING_PASSWORD"]]
    assert [value for value in secrets if value.encode() in written] == []


def test_check(logged_in, monkeypatch, capsys):
    assert main(["tracking", "check", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(one["name"], one["state"]) for one in found] == [
        ("server", "ok"), ("experiment", "ok"), ("run", "ok"), ("artifacts", "ok"),
    ]  # fmt: skip
    assert logged_in.query("select 1 from runs where name = 'wmtp tracking check' and lifecycle_stage = 'active'") == []
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a-wrong-password")
    assert main(["tracking", "check"]) == 78
    said = capsys.readouterr().out
    assert said.startswith("denied  server")
    assert "a-wrong-password" not in said
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert main(["tracking", "check"]) == 75
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert main(["tracking", "check"]) == 78


def test_a_store_on_this_disk_is_a_server_too(tiny_run, tmp_path):
    uri = f"file:{tmp_path}/store"
    tiny_run(tmp_path / "work", f"tracking.uri={uri}", "training.max_steps=2", "tracking.system_seconds=0")
    run = run_id(RunPaths(tmp_path / "work", TINY_RUN), uri)
    [folder] = (tmp_path / "store").glob(f"*/{run}")
    assert [line.split()[2] for line in (folder / "metrics" / "loss").read_text().splitlines()] == ["1", "2"]
    assert (folder / "artifacts" / "logs" / "training.log").exists()


@pytest.mark.slow
def test_a_run_without_a_server_is_opened_from_the_bucket(tiny_run, tmp_path, monkeypatch, capsys):
    if not PROGRAM.exists():
        pytest.skip(f"there is no {PROGRAM}: scripts/test.sh installs it")
    bucket = tmp_path / "bucket"
    cloud = ("cloud.provider=local", f"cloud.bucket={bucket}")
    tiny_run(tmp_path / "one", *cloud, "training.max_steps=3", "tracking.system_seconds=0")
    assert (bucket / "mlflow" / TINY_RUN / "run.json").exists()
    shutil.rmtree(tmp_path / "one")
    monkeypatch.setenv("WMTP_WORKDIR", str(tmp_path / "two"))
    sets = [word for setting in cloud for word in ("--set", setting)]
    assert main(["tracking", "open", "--once", "--port", "0", "--mlflow", str(PROGRAM), *sets]) == 0
    assert TINY_RUN in capsys.readouterr().out
    import sqlite3

    database = sqlite3.connect(tmp_path / "two" / "cache" / "tracking" / "server" / "mlflow.db")
    try:
        rows = database.execute("select step from metrics where key = 'loss' order by step").fetchall()
        assert [step for (step,) in rows] == [1, 2, 3]
        assert database.execute("select status from runs").fetchall() == [("FINISHED",)]
    finally:
        database.close()
