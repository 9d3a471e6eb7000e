"""Whole runs and commands with a real MLflow server."""

import json
import shutil
import subprocess
from html import escape
from json import dumps
from urllib.parse import urlsplit

import pytest

from tests.conftest import TINY_RUN
from tests.servers.mlflow import PROGRAM, need, tls
from tests.servers.proxy import Proxy
from tests.tracking.test_server import run_id, status
from tests.training.stopping import StopAfter
from wmtp_worker.checkpoint.manifest import read_manifest
from wmtp_worker.cli import main
from wmtp_worker.errors import DiskFullError, Interrupted
from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.tracking import session
from wmtp_worker.tracking.check import check
from wmtp_worker.tracking.metrics import read

# one server for all of them
pytestmark = pytest.mark.xdist_group("mlflow")

PLANTED = {
    "AWS_SECRET_ACCESS_KEY": "planted-secret-of-aws",
    "AZURE_STORAGE_KEY": "planted-secret-of-azure",
    "HF_TOKEN": "planted-secret-of-the-hub",
    "MY_API_KEY": 'planted "secret" & of <mine>',
    "GOOGLE_APPLICATION_CREDENTIALS_JSON": '{"private_key": "planted-secret-of-google"}',
}


def everything(folder) -> bytes:
    return b"\n".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def artifacts_of(server, run) -> dict[str, bytes]:
    """What the run has in the server's bucket."""
    import boto3

    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    key, secret = (server.of_artifacts[name] for name in names)
    client = boto3.client(
        "s3",
        endpoint_url=server.of_artifacts["MLFLOW_S3_ENDPOINT_URL"],
        aws_access_key_id=key,
        aws_secret_access_key=secret,
        region_name="us-east-1",
    )
    bucket = urlsplit(server.artifacts).netloc
    found = client.list_objects_v2(Bucket=bucket).get("Contents", [])
    keys = [item["Key"] for item in found if f"/{run}/artifacts/" in item["Key"]]
    files = {key.partition("/artifacts/")[2]: client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}
    client.close()
    return files


def test_a_run_that_was_stopped_is_one_run_with_all_of_it(tiny_run, logged_in, tmp_path, monkeypatch):
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    server, paths = logged_in, RunPaths(tmp_path, TINY_RUN)
    overrides = (
        f"tracking.uri={server.uri}",
        "tracking.close_seconds=240",
        f"tracking.tags=note={PLANTED['AWS_SECRET_ACCESS_KEY']}",
        "tracking.best_model=move",
        "tracking.model_version=v7",
        "tracking.experiment_prefix=tests",
        "tracking.system_seconds=0.2",
    )
    monkeypatch.setattr(session, "_STOP_SECONDS", 120.0)  # a sender needs some on a busy machine
    with pytest.raises(Interrupted):
        tiny_run(tmp_path, *overrides, stop=StopAfter(15))
    run = run_id(paths, server.uri)
    assert status(server, run) == "KILLED"
    (paths.logs / "predictions.jsonl").write_text(dumps({"text": [PLANTED["HF_TOKEN"], PLANTED["MY_API_KEY"]]}) + "\n")
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

    files = artifacts_of(server, run)
    assert {"logs/training.log", "predictions/predictions.jsonl"} <= files.keys()
    assert {"checkpoints/checkpoints.json", "checkpoints/best_model.pt"} <= files.keys()
    assert json.loads(files["checkpoints/checkpoints.json"])["steps"][-1] == "step_12"
    assert not paths.best.exists()

    (paths.logs / "predictions.jsonl").unlink()  # where the secret was planted
    address = ("-h", "127.0.0.1", "-p", str(server.postgres_port), "-U", "postgres")
    dump = subprocess.run([need("pg_dump"), *address, "postgres"], capture_output=True, check=True, timeout=180).stdout
    written = dump + b"\n".join(files.values()) + everything(tmp_path)
    assert run.encode() in dump
    encoded = [encode(value) for value in PLANTED.values() for encode in (str, escape, lambda text: dumps(text)[1:-1])]
    secrets = [*encoded, "planted-secret-of-google", server.environ["MLFLOW_TRACKING_PASSWORD"]]
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
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9/401/403/")  # digits that are no answer
    assert main(["tracking", "check"]) == 75
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert main(["tracking", "check"]) == 78


@pytest.mark.parametrize(
    ("answer", "body", "match", "code"),
    [
        (403, '{"message": "Forbidden"}', "experiments/search", 78),  # a gateway's, and not MLflow's
        (403, "<html>no</html>", "PUT .*/check.bin", 78),
        (500, '{"error_code": "INTERNAL_ERROR", "message": "HeadObject: 403 Forbidden"}', "PUT .*/check.bin", 75),
    ],
)
def test_check_tells_a_refusal_from_a_fault(answer, body, match, code, logged_in, monkeypatch, capsys):
    with Proxy("127.0.0.1", logged_in.port) as proxy:
        proxy.answer(answer, body=body, match=match, times=9)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.endpoint)
        assert main(["tracking", "check"]) == code, capsys.readouterr().out


def test_check_names_a_token(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "a-token")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    assert next(check(f"file:{tmp_path}/store", "tests")).detail.endswith("answers, with a token")


def test_check_by_tls(logged_in, monkeypatch, capsys):
    with tls(logged_in) as (uri, certificate):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert main(["tracking", "check"]) == 75  # nobody says that this certificate is theirs
        monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(certificate))
        assert main(["tracking", "check"]) == 0, capsys.readouterr().out


def test_a_full_disk_costs_no_number(small_disk, tiny_run, logged_in):
    folder, server = small_disk(2700), logged_in  # room for one checkpoint and the exports, not for two checkpoints
    paths = RunPaths(folder, TINY_RUN)
    overrides = ("checkpoint.keep_last=3", f"tracking.uri={server.uri}", "tracking.close_seconds=240")
    with pytest.raises(DiskFullError, match="step_12 could not be saved"):
        tiny_run(folder, *overrides)
    run = run_id(paths, server.uri)
    assert server.metrics(run)["loss"] == list(range(1, 13))
    assert status(server, run) == "FAILED"
    small_disk(20_000)
    assert tiny_run(folder, *overrides).resumed_from == 3
    assert run_id(paths, server.uri) == run
    assert server.metrics(run)["loss"] == list(range(1, 13))
    assert status(server, run) == "FINISHED"


def test_a_store_on_this_disk_is_a_server_too(tiny_run, tmp_path):
    uri = f"file:{tmp_path}/store"
    patient = ("tracking.system_seconds=0", "tracking.close_seconds=240")
    tiny_run(tmp_path / "work", f"tracking.uri={uri}", "training.max_steps=2", *patient)
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
