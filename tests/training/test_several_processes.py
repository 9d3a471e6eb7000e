"""Whole runs of several processes against the same run of one, whichever number of them it was begun and ended with."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tests.conftest import TINY, TINY_RUN
from tests.ranks import apart
from tests.servers.processes import free_ports
from wmtp_worker.checkpoint.restore import find
from wmtp_worker.checkpoint.snapshot import MODEL, OPTIMIZER
from wmtp_worker.errors import AGAIN, DONE, Interrupted, SettingsError
from wmtp_worker.host.stop import StopRequest
from wmtp_worker.settings import load
from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.tracking.metrics import read

OURS = ("training.accumulation=4", "evaluation.max_batches=3", "checkpoint.keep_last=20", "cloud.provider=local")
SECONDS = 400
CLOCK = ("seconds", "wait", "time")


class StopAt(StopRequest):
    """Asked for when it was looked at so often."""

    def __init__(self, looks):
        super().__init__()
        self.looks = looks

    @property
    def requested(self):
        self.looks -= 1
        if self.looks == 0:
            self.request("the test")
        return super().requested


def train(workdir, *overrides, model=None, stop=None):
    """A run in this process, alone or as one rank of a group; of a new model, or of one on the disk."""
    from wmtp_worker.training import run

    tiny = TINY
    if model is not None:  # which has a shape of its own
        tiny = (*(text for text in TINY if not text.startswith("model.")), f"model.path={model}", "model.heads=2")
    settings = load(
        overrides=[*tiny, *OURS, *overrides],
        options={"run.name": TINY_RUN, "run.workdir": str(workdir)},
        environ={},
    )
    return run.run(settings, stop or StopRequest(), Console(file=io.StringIO()))


# adapters on a model on the disk, weights that several processes have to agree on
FAMILY = ("weighting.family=gradient", "weighting.control=shuffled", "lora.rank=2", "lora.dropout=0.2",
          "weighting.warmup=2", "training.max_steps=4", "training.lr=1e-4")  # fmt: skip


def every_way(rank, world, workdir, ports, model):
    ports = iter(ports)

    def train_here(folder, *overrides, model=None, stop_rank=None, looks=0):
        os.environ["MASTER_PORT"] = str(next(ports))  # the one before may still be held by what is over
        stop = StopAt(looks) if rank == stop_rank else StopRequest()
        if stop_rank is None:
            assert (train(workdir / folder, *overrides, model=model, stop=stop) is None) == (rank > 0)
            return
        with pytest.raises(Interrupted):
            train(workdir / folder, *overrides, stop=stop)

    shards = f"parallel.shards={world}"
    train_here("copies")
    # stopped in the middle of a step, one rank knowing of it only
    train_here("copies-twice", stop_rank=1, looks=7)
    train_here("copies-twice")
    train_here("shards", shards)
    train_here("shards-twice", shards, stop_rank=1, looks=9)
    train_here("shards-twice", shards)
    # one process goes on from this, and ends what one process began
    train_here("shards-one", shards, stop_rank=0, looks=9)
    train_here("one-shards", shards)
    train_here("family", *FAMILY, model=model)
    with pytest.raises(SettingsError, match=r"cannot be shared by 2 processes .* set training.accumulation=4"):
        train_here("odd", "training.accumulation=3")


def content(workdir):
    """The last checkpoint's tensors, what was exported, and the record without what is of the clock."""
    paths = RunPaths(workdir, TINY_RUN)
    checkpoint = find(paths, "auto")
    final = torch.load(paths.final, weights_only=True)["model"]
    lines = [{key: value for key, value in line.items() if key not in CLOCK} for line in read(paths.metrics)]
    return {**checkpoint.model_tensors()}, dict(checkpoint.tensors(OPTIMIZER)), final, lines


def same_bits(one, other):
    for tensors, others in zip(one[:3], other[:3], strict=True):
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    assert one[3] == other[3]


def nearly_the_same(one, other):
    for tensors, others in zip(one[:3], other[:3], strict=True):
        assert tensors.keys() == others.keys()
        for name in tensors:
            assert torch.allclose(tensors[name], others[name], atol=2e-5), name
    assert len(one[3]) == len(other[3])
    for line, said in zip(one[3], other[3], strict=True):
        assert line.keys() == said.keys()
        for key, value in line.items():
            assert value == said[key] or value == pytest.approx(said[key], rel=1e-4, abs=1e-6), (line["step"], key)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_run_is_the_same_on_one_and_two_ranks_and_in_between(tmp_path, tiny_model_folder):
    train(tmp_path / "one")
    with pytest.raises(Interrupted):
        train(tmp_path / "one-shards", stop=StopAt(20))
    train(tmp_path / "family-one", *FAMILY, model=tiny_model_folder)
    apart(2, every_way, tmp_path, free_ports(12), tiny_model_folder)
    train(tmp_path / "shards-one")

    one = content(tmp_path / "one")
    for folder in ("copies", "shards", "shards-one", "one-shards"):
        nearly_the_same(one, content(tmp_path / folder))
    nearly_the_same(content(tmp_path / "family-one"), content(tmp_path / "family"))
    same_bits(content(tmp_path / "copies"), content(tmp_path / "copies-twice"))
    same_bits(content(tmp_path / "shards"), content(tmp_path / "shards-twice"))
    shards = find(RunPaths(tmp_path / "shards", TINY_RUN), "auto")
    assert shards.manifest.world_size == 2
    assert sum(name.startswith(MODEL.split(".")[0]) for name in shards.manifest.files) == 2


# everything that makes a step smaller, at once
LEAN = (
    "training.precision=bf16",
    "training.moments=bf16",
    "training.checkpoint_activations=full",
    "training.max_steps=4",
    "evaluation.every=2",
    "evaluation.max_batches=1",
    "checkpoint.every=1",
)


def four_ranks(rank, world, workdir, ports, model):
    for port, shards in zip(ports, (2, world), strict=True):
        os.environ["MASTER_PORT"] = str(port)
        first = shards == 2
        with pytest.raises(Interrupted) if first else contextlib.nullcontext():
            stop = StopAt(4) if first and rank == 3 else None
            train(workdir, *LEAN, f"parallel.shards={shards}", model=model, stop=stop)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_four_ranks_in_bf16_that_recompute_end_where_one_process_does(tmp_path, tiny_model_folder):
    """Two copies in two shards, then one in four, of a model on the disk."""
    train(tmp_path / "one", *LEAN, model=tiny_model_folder)
    apart(4, four_ranks, tmp_path / "four", free_ports(2), tiny_model_folder)
    one, four = content(tmp_path / "one"), content(tmp_path / "four")
    checkpoints = sorted(RunPaths(tmp_path / "four", TINY_RUN).checkpoints.glob("step_*/manifest.json"))
    assert json.loads(checkpoints[-1].read_text())["world_size"] == 4
    assert {value.dtype for name, value in four[1].items() if "exp_avg" in name} == {torch.bfloat16}
    nearly_the_same(one, four)


def children(pid):
    return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for_step(paths, step, process):
    end = time.monotonic() + SECONDS
    while not any(line["step"] >= step for line in read(paths.metrics)):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_lost_rank_a_signal_and_torchrun(tmp_path):
    paths = RunPaths(tmp_path / "several", TINY_RUN)
    # long enough to be struck in the middle
    steps = ("training.max_steps=60", "evaluation.every=30", "checkpoint.every=5")
    options = ["train", "--run-name", TINY_RUN, "--set", f"run.workdir={tmp_path / 'several'}"]
    options += [text for value in (*TINY, *OURS, *steps) for text in ("--set", value)]
    ours = [sys.executable, "-m", "wmtp_worker", *options]
    process = subprocess.Popen([*ours, "--set", "parallel.processes=2"], stderr=subprocess.PIPE, text=True)
    try:
        wait_for_step(paths, 7, process)
        first, second = children(process.pid)
        os.kill(second, signal.SIGKILL)
        end = time.monotonic() + SECONDS
        while {first, second} & set(children(process.pid)) or len(children(process.pid)) < 2:
            assert time.monotonic() < end
            time.sleep(0.02)
        done = max(line["step"] for line in read(paths.metrics))
        wait_for_step(paths, done + 2, process)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=SECONDS)[1]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == AGAIN, said
    assert "process 1 by SIGKILL; starting all 2 again" in said
    assert "Traceback" not in said

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    torchrun += [f"--master-port={free_ports(1)[0]}", "-m", "wmtp_worker", *options, "--set", "parallel.shards=2"]
    ended = subprocess.run(torchrun, timeout=SECONDS, capture_output=True, text=True, check=False)
    assert ended.returncode == DONE, ended.stderr
    trained = [line["step"] for line in read(paths.metrics) if line["kind"] == "train"]
    assert trained == list(range(1, 61))
    train(tmp_path / "one", *steps)
    nearly_the_same(content(tmp_path / "one"), content(tmp_path / "several"))
