"""`wmtp checkpoints`: the checkpoints of a run, what its interruptions cost, and what is published later."""

import json

import pytest

from wmtp_worker.checkpoint.ledger import Reached, Running, Save, Start
from wmtp_worker.checkpoint.manifest import Manifest
from wmtp_worker.errors import ExhaustedError
from wmtp_worker.settings import load
from wmtp_worker.storage import CloudSync
from wmtp_worker.storage.cloud import Terms
from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.storage.seal import seal_folder

DAY = 1_700_000_000.0


@pytest.fixture
def paths(tmp_path):
    """A run with a checkpoint of step 400 that has a manifest and nothing else."""
    paths = RunPaths(tmp_path / "work", "x")
    paths.step(400).mkdir(parents=True)
    Manifest(step=400, run="x", created="", settings_digest="", worker_version="", torch_version="", files={}).write(
        paths.step(400)
    )
    return paths


def write(paths, *events):
    paths.logs.mkdir(parents=True)
    paths.ledger.write_text("".join(event.model_dump_json() + "\n" for event in events) + '{"event": "sa')


def killed_once():
    def start(process, at, reached=0):
        return Start(
            process=process,
            time=DAY + at,
            host="gpu-[box]",
            pid=1,
            gpus=8,
            price_per_hour=36.0,
            reached=Reached(step=reached, time=DAY + 880 if reached else None),
        )

    return (
        start("a", 0),
        Running(process="a", time=DAY + 10, resumed_from=None),
        Save(process="a", time=DAY + 800, step=400, pause=1.0, seconds_per_step=2.0),
        start("b", 1000, reached=437),
        Running(process="b", time=DAY + 1100, resumed_from=400, phases={"boot": 20.0, "fetch": 80.0}),
    )


def test_a_run_without_a_ledger_shows_its_checkpoints(command, paths):
    done = command("checkpoints", "ls", "x", WMTP_WORKDIR=str(paths.workdir))
    assert "step_400" in done.stdout
    assert "lost" not in done.stdout
    report = json.loads(command("checkpoints", "ls", "x", "--json", WMTP_WORKDIR=str(paths.workdir)).stdout)
    assert [item["name"] for item in report["checkpoints"]] == ["step_400"]
    assert report["losses"]["interruptions"] == []


def test_what_a_kill_cost(command, paths):
    write(paths, *killed_once())
    out = command("checkpoints", "ls", "x", WMTP_WORKDIR=str(paths.workdir)).stdout
    (row,) = [line for line in out.splitlines() if "killed" in line]
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    # 37 steps of 2 s and 100 s of starting, on 8 GPUs: 1392 s; 174 s at 36 an hour; away from 880 to 1000
    assert cells[1:] == ["gpu-[box]", "killed", "400", "37", "74.0 s", "100.0 s", "23.2 min", "1.74", "2.0 min"]
    assert "boot 20.0 s" in out
    assert "fetch 80.0 s" in out
    assert "1 interruption in 16.3 min of running, 37 steps done again" in out


def test_the_same_as_json(command, paths):
    write(paths, *killed_once())
    report = json.loads(command("checkpoints", "ls", "x", "--json", WMTP_WORKDIR=str(paths.workdir)).stdout)
    (item,) = report["losses"]["interruptions"]
    assert (item["steps"], item["gpu_seconds"], item["restart"]) == (37, 8 * 174.0, {"boot": 20.0, "fetch": 80.0})
    assert report["losses"]["saves"] == 1


def test_verify_stays_a_list(command, paths):
    write(paths, *killed_once())
    listed = command("checkpoints", "verify", "x", "--json", WMTP_WORKDIR=str(paths.workdir)).stdout
    assert [item["status"] for item in json.loads(listed)] == ["verified"]


@pytest.fixture
def bucket(tmp_path):
    """The variables of a folder as bucket, and a `CloudSync` of somebody else who uses it."""
    (tmp_path / "disk").mkdir()
    environ = {"CLOUD_PROVIDER": "local", "CLOUD_BUCKET": str(tmp_path / "disk" / "bucket")}
    with CloudSync(load(environ=dict(environ)).cloud, tmp_path / "elsewhere", terms=Terms(seconds=1)) as other:
        other.environ = environ
        yield other


def sealed(workdir, step):
    folder = RunPaths(workdir, "x").step(step)
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text(f"weights {step}")
    seal_folder(folder)


def test_push_publishes_checkpoints_and_logs(command, tmp_path, bucket):
    work = tmp_path / "work"
    sealed(work, 40)
    RunPaths(work, "x").logs.mkdir(parents=True)
    RunPaths(work, "x").training_log.write_text("of this run")
    assert "published: step_40" in command("checkpoints", "push", "x", WMTP_WORKDIR=str(work), **bucket.environ).stdout
    assert bucket.run("x").published_steps() == [40]
    assert bytes(bucket.store.get("logs/x/training.log")[1]) == b"of this run"
    again = command("checkpoints", "push", "x", WMTP_WORKDIR=str(work), **bucket.environ)
    assert "the bucket has all checkpoints already" in again.stdout


def test_push_says_that_the_bucket_is_newer(command, tmp_path, bucket):
    sealed(bucket.workdir, 60)
    bucket.sync_checkpoints("x")
    sealed(tmp_path / "work", 50)
    RunPaths(tmp_path / "work", "x").final.write_text("of another branch")
    done = command("checkpoints", "push", "x", code=74, WMTP_WORKDIR=str(tmp_path / "work"), **bucket.environ)
    assert "the bucket has step_60" in done.stderr
    assert "--resume 50 sets that one aside" in done.stderr
    assert bucket.run("x").published_steps() == [60]


def test_push_leaves_a_run_alone_that_is_trained_elsewhere(command, tmp_path, bucket):
    side = bucket.run("x")
    bucket.hold(side)
    bucket.store.put("logs/x/training.log", b"of the live worker")
    paths = RunPaths(tmp_path / "work", "x")
    paths.checkpoints.mkdir(parents=True)  # ended before its first save
    paths.logs.mkdir(parents=True)
    paths.training_log.write_text("of one that is gone")
    done = command("checkpoints", "push", "x", code=79, WMTP_WORKDIR=str(tmp_path / "work"), **bucket.environ)
    assert "is being trained by pid" in done.stderr
    assert bytes(bucket.store.get("logs/x/training.log")[1]) == b"of the live worker"


def test_push_to_a_bucket_that_is_not_there(command, tmp_path):
    sealed(tmp_path / "work", 40)
    nowhere = {"CLOUD_PROVIDER": "local", "CLOUD_BUCKET": str(tmp_path / "not" / "mounted" / "bucket")}
    command("checkpoints", "push", "x", code=78, WMTP_WORKDIR=str(tmp_path / "work"), **nowhere)


def test_push_of_a_damaged_checkpoint_is_no_matter_of_time(command, tmp_path, bucket):
    work = tmp_path / "work"
    sealed(work, 40)
    sealed(work, 60)
    (RunPaths(work, "x").step(40) / "model.safetensors").write_text("WEIGHTS 40")
    command("checkpoints", "push", "x", code=78, WMTP_WORKDIR=str(work), **bucket.environ)
    assert bucket.run("x").published_steps() == [60]


def test_what_stays_where_it_is_has_a_name_even_before_the_first_save(bucket, monkeypatch):
    def away(*arguments):
        raise ExhaustedError("away")

    monkeypatch.setattr(CloudSync, "hold", away)
    assert bucket.sync_checkpoints("x").not_safe == {"run x": "away"}
