"""`wmtp checkpoints ls`: the checkpoints of a run, and what its interruptions cost."""

import json

import pytest

from wmtp_worker.checkpoint.ledger import Reached, Running, Save, Start
from wmtp_worker.checkpoint.manifest import Manifest
from wmtp_worker.storage.layout import RunPaths

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
