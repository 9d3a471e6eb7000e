"""The next step's batches: made while this one computes, the same from wherever one begins, and no thread left over."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.training.stopping import StopAfter
from wmtp_worker.data.dataset import Dataset
from wmtp_worker.data.sampler import PackedSampler, Position
from wmtp_worker.data.tokenizer import Sample
from wmtp_worker.errors import Interrupted
from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.tracking.metrics import read
from wmtp_worker.training.group import Group
from wmtp_worker.training.policy import PolicyTask
from wmtp_worker.training.prefetch import Prefetcher

STEP = SimpleNamespace(micro_batch_size=2, accumulation=3)
SECONDS = 60


@pytest.fixture
def data():
    samples = [Sample(np.arange(length, dtype=np.int32), 1) for length in range(2, 25)]
    sampler = PackedSampler([len(sample.ids) for sample in samples], 24, seed=7)
    return Dataset(samples, sampler, 24, pad_id=0)


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")] == []


def prefetcher(data):
    return Prefetcher(data, STEP, Group(torch.device("cpu")))


def test_steps_are_those_of_the_sampler_from_any_position_on(data):
    position, positions, taken = Position(), [], []
    with prefetcher(data) as ahead:
        for _ in range(7):
            positions.append(position)
            taken.append(ahead.take(position))
            position = taken[-1].after
    assert position.epoch > 1
    for start, step in zip(positions, taken, strict=True):
        rows, after = data.sampler.take(start, 6)
        assert (rows, after) == (step.rows, step.after)
        for number, batch in enumerate(step.batches):
            assert torch.equal(batch.input_ids, data.batch(rows[2 * number : 2 * number + 2]).input_ids)
        with prefetcher(data) as resumed:
            assert resumed.take(start).rows == rows


def test_the_next_step_is_made_while_this_one_computes(data, monkeypatch):
    made, batch = threading.Semaphore(0), Dataset.batch
    monkeypatch.setattr(Dataset, "batch", lambda self, rows: (made.release(), batch(self, rows))[1])
    with prefetcher(data) as ahead:
        ahead.take(Position())
        assert all(made.acquire(timeout=SECONDS) for _ in range(2 * STEP.accumulation))
    assert not made.acquire(blocking=False)


def failing(error, after):
    calls = iter(range(after))
    batch = Dataset.batch

    def fails(self, rows):
        if next(calls, None) is None:
            raise error
        return batch(self, rows)

    return fails


def test_what_fails_in_the_thread_fails_where_its_step_is_taken(data, monkeypatch):
    monkeypatch.setattr(Dataset, "batch", failing(OSError("the disk is gone"), after=STEP.accumulation))
    with prefetcher(data) as ahead:
        step = ahead.take(Position())
        with pytest.raises(OSError, match="the disk is gone"):
            ahead.take(step.after)


def test_a_run_joins_the_thread_on_every_way_out(tiny_run, tmp_path, monkeypatch):
    threads = []
    begin = PolicyTask.begin

    def noting(self, step, batches):
        threads.append([thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")])
        return begin(self, step, batches)

    monkeypatch.setattr(PolicyTask, "begin", noting)
    short = ("training.max_steps=3", "evaluation.every=0", "evaluation.max_batches=1")
    with pytest.raises(Interrupted):
        tiny_run(tmp_path, *short, stop=StopAfter(3), report=False)
    _no_prefetch()
    tiny_run(tmp_path, *short, report=False)
    _no_prefetch()
    for error in (KeyboardInterrupt, ValueError):
        monkeypatch.setattr(PolicyTask, "loss", lambda self, error=error: (_ for _ in ()).throw(error()))
        with pytest.raises(error):
            tiny_run(tmp_path / error.__name__, *short, report=False)
        _no_prefetch()
    assert all(len(names) == 1 for names in threads)
    lines = [line for line in read(RunPaths(tmp_path, "tiny").metrics) if line["kind"] == "train"]
    assert [line["step"] for line in lines] == [1, 2, 3]


def _no_prefetch():
    assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())


def test_the_wait_counts_whatever_stands_before_the_first_micro_batch(tiny_run, tmp_path, monkeypatch):
    begin, dawdle = PolicyTask.begin, threading.Event()

    def slow(self, step, batches):
        dawdle.wait(0.05)
        return begin(self, step, batches)

    monkeypatch.setattr(PolicyTask, "begin", slow)
    tiny_run(tmp_path, "training.max_steps=2", "evaluation.every=0", "evaluation.max_batches=1", report=False)
    lines = [line for line in read(RunPaths(tmp_path, "tiny").metrics) if line["kind"] == "train"]
    assert all(0.05 <= line["wait"] < line["seconds"] for line in lines)
