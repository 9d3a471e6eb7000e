"""Whole runs of several processes against the same run of one, whichever number of them it was begun and ended with."""

import io
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tests.conftest import TINY, TINY_RUN
from tests.ranks import apart
from wmtp_worker.checkpoint.restore import find
from wmtp_worker.checkpoint.snapshot import MODEL, OPTIMIZER
from wmtp_worker.errors import AGAIN, DONE, Interrupted, SettingsError
from wmtp_worker.host.stop import StopRequest
from wmtp_worker.settings import load
from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.tracking.metrics import read

OURS = ("training.accumulation=4", "evaluation.max_batches=3", "checkpoint.keep_last=20", "cloud.provider=local")
SECONDS = 240
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


def train(workdir, *overrides, stop=None):
    """A run in this process, alone or as one rank of a group."""
    from wmtp_worker.training import run

    settings = load(
        overrides=[*TINY, *OURS, *overrides],
        options={"run.name": TINY_RUN, "run.workdir": str(workdir)},
        environ={},
    )
    return run.run(settings, stop or StopRequest(), Console(file=io.StringIO()))


def every_way(rank, world, workdir, ports):
    ports = iter(ports)

    def train_here(folder, *overrides, stop_rank=None, looks=0):
        os.environ["MASTER_PORT"] = str(next(ports))  # the one before may still be held by what is over
        stop = StopAt(looks) if rank == stop_rank else StopRequest()
        if stop_rank is None:
            assert (train(workdir / folder, *overrides, stop=stop) is None) == (rank > 0)
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
    families = ("weighting.family=gradient", "weighting.control=shuffled", "lora.rank=2", "lora.dropout=0.2")
    train_here("family", *families, "weighting.warmup=2", "training.max_steps=4", "training.lr=1e-4")
    with pytest.raises(SettingsError, match=r"cannot be shared by 2 processes .* set training.accumulation=4"):
        train_here("odd", "training.accumulation=3")


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


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
def test_a_run_is_the_same_on_one_and_two_ranks_and_in_between(tmp_path):
    train(tmp_path / "one")
    with pytest.raises(Interrupted):
        train(tmp_path / "one-shards", stop=StopAt(20))
    families = ("weighting.family=gradient", "weighting.control=shuffled", "lora.rank=2", "lora.dropout=0.2")
    train(tmp_path / "family-one", *families, "weighting.warmup=2", "training.max_steps=4", "training.lr=1e-4")
    apart(2, every_way, tmp_path, free_ports(12))
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


def children(pid):
    return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for_step(paths, step, process):
    end = time.monotonic() + SECONDS
    while not any(line["step"] >= step for line in read(paths.metrics)):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
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
