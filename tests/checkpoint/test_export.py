"""The best model, written behind the training: copied like a save, and on the disk before whatever names it."""

import logging
import threading
import time

import pytest
import torch

from wmtp_worker.checkpoint import export, staging
from wmtp_worker.checkpoint import saver as saver_module
from wmtp_worker.checkpoint.export import load_weights, save_weights, step_of
from wmtp_worker.checkpoint.saver import Saver
from wmtp_worker.errors import CheckpointError, DiskFullError, InputError


def weights(step):
    return {
        "w": torch.full((1000,), float(step)),
        "b": torch.full((3,), step, dtype=torch.bfloat16),
        "scalar": torch.tensor(float(step)),
        "none": torch.empty(0, 4),
        "transposed": torch.arange(12.0).reshape(3, 4).T,
    }


def facts(step):
    return {"step": step, "config": {"layers": (1, 2)}, "validation": {"loss": 1 / step}}


class Brake:
    """Stands in for `save_weights`: each call stops until it is let go."""

    def __init__(self, monkeypatch):
        self._write, self._go = save_weights, threading.Semaphore(0)
        self.begun = []
        monkeypatch.setattr(saver_module, "save_weights", self)

    def __call__(self, path, tensors, facts, heed):
        self.begun.append(facts["step"])
        assert self._go.acquire(timeout=20)
        self._write(path, tensors, facts, heed)

    def let_go(self, times=1):
        self._go.release(times)

    def wait_for(self, begun):
        limit = time.monotonic() + 20
        while self.begun != begun:
            assert time.monotonic() < limit, self.begun
            time.sleep(0.005)


@pytest.fixture
def brake(monkeypatch):
    return Brake(monkeypatch)


def full(monkeypatch, times):
    """A disk that has no room for the weights, so many times."""
    write, left = save_weights, [True] * times

    def sometimes(*arguments):
        if left:
            left.pop()
            raise DiskFullError("the disk is full")
        write(*arguments)

    monkeypatch.setattr(saver_module, "save_weights", sometimes)
    return left


@pytest.mark.parametrize("background", [True, False])
def test_the_file_is_what_the_loop_would_have_written(paths, background):
    tensors, told = weights(1), facts(1)
    with Saver(paths, background=background) as saver:
        saver.prepare({}, tensors)
        saver.export(paths.best, 1, tensors, told)
        told["validation"]["loss"] = 99.0
        saver.gate()
        for value in tensors.values():
            value.fill_(-1)
        saver.flush()
    save_weights(paths.final, weights(1), facts(1))
    assert paths.best.read_bytes() == paths.final.read_bytes()
    assert torch.equal(load_weights(paths.best)["model"]["w"], weights(1)["w"])
    assert not list(paths.checkpoints.glob(".tmp-*"))


def test_the_gate_keeps_its_tensors_whole(paths, monkeypatch):
    copy = staging._copy

    def slowly(view, tensor):
        time.sleep(0.02)
        copy(view, tensor)

    monkeypatch.setattr(staging, "_copy", slowly)
    tensors = {f"w{number}": torch.zeros(100) for number in range(20)}
    with Saver(paths) as saver:
        saver.prepare({}, tensors)
        saver.export(paths.best, 1, tensors, facts(1))
        saver.gate()
        for value in tensors.values():
            value.fill_(1)
    assert all((value == 0).all() for value in load_weights(paths.best)["model"].values())


def test_no_checkpoint_is_there_before_the_best_model_that_it_names(paths, snapshot, brake):
    best = []
    with Saver(paths, written=lambda step, folder: best.append((step, step_of(paths.best)))) as saver:
        saver.prepare(snapshot(1).tensors, weights(1))
        saver.export(paths.best, 1, weights(1), facts(1))
        saver.save(snapshot(1))
        saver.gate()
        brake.wait_for([1])
        assert (paths.steps(), saver.pending) == ([], {1})
        assert saver.before_now > 4000
        saver.save(snapshot(2))  # names the same
        saver.gate()
        # a better one, while the first is being written: it is copied when that is done, and then comes first
        saver.export(paths.best, 3, weights(3), facts(3))
        brake.let_go(2)
        saver.save(snapshot(3))
        saver.gate()
        saver.flush()
    assert best[-1] == (3, 3)
    assert all(named <= there for named, there in best)
    assert brake.begun == [1, 3]


def test_a_better_one_takes_the_place_of_one_that_waits(paths, snapshot, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    write, go = saver_module.store.write, threading.Event()

    def wait(*arguments, **options):
        assert go.wait(20)
        return write(*arguments, **options)

    monkeypatch.setattr(saver_module.store, "write", wait)
    with Saver(paths) as saver:
        saver.prepare(snapshot(1).tensors, weights(1))
        saver.save(snapshot(1))
        saver.gate()
        while saver.writing is None:
            time.sleep(0.005)
        for step in (2, 3):
            saver.export(paths.best, step, weights(step), facts(step))
            saver.gate()
        go.set()
        saver.flush()
    assert step_of(paths.best) == 3
    assert "best_model.pt of step_2 is not written: step_3 came first" in caplog.text


def test_an_emergency_save_comes_after_the_best_model(paths, snapshot, brake):
    with Saver(paths) as saver:
        saver.prepare(snapshot(1).tensors, weights(1))
        saver.export(paths.best, 1, weights(1), facts(1))
        saver.gate()
        brake.wait_for([1])
        threading.Timer(0.1, lambda: (brake.begun.append(paths.steps()), brake.let_go())).start()
        saver.save_now(snapshot(2))
    assert brake.begun == [1, []]
    assert (step_of(paths.best), paths.steps()) == (1, [2])


def test_a_full_disk_is_tried_again_after_the_next_save(paths, snapshot, monkeypatch, caplog):
    left, rooms = full(monkeypatch, 2), []
    with Saver(paths, make_room=lambda: rooms.append(1)) as saver:
        saver.prepare(snapshot(1).tensors, weights(1))
        saver.export(paths.best, 1, weights(1), facts(1))
        saver.flush()
        assert (left, rooms, paths.best.exists()) == ([], [1], False)
        assert "best_model.pt of step_1 is NOT saved, the training goes on" in caplog.text
        saver.save(snapshot(2))
        saver.flush()
    assert (step_of(paths.best), paths.steps()) == (1, [2])


def test_a_full_disk_keeps_no_checkpoint_from_being_saved(paths, snapshot, monkeypatch):
    full(monkeypatch, 99)
    with Saver(paths) as saver:
        saver.prepare(snapshot(1).tensors, weights(1))
        for step in (1, 2):
            saver.export(paths.best, step, weights(step), facts(step))
            saver.save(snapshot(step))
            saver.gate()
            assert saver.flush(20)
    assert paths.steps() == [1, 2]


def test_other_errors_are_raised_by_the_next_call(paths, snapshot, monkeypatch):
    def refuse(*arguments):
        raise InputError("cannot write")

    monkeypatch.setattr(saver_module, "save_weights", refuse)
    saver = Saver(paths)
    saver.prepare(snapshot(1).tensors, weights(1))
    saver.export(paths.best, 1, weights(1), facts(1))
    with pytest.raises(InputError):
        saver.flush()
    saver.close()


def test_the_step_of_a_file_is_found_without_reading_it(paths, monkeypatch):
    save_weights(paths.best, weights(7), facts(7))
    assert step_of(paths.best) == 7
    assert step_of(paths.final) is None
    paths.best.write_bytes(paths.best.read_bytes()[:100])
    assert step_of(paths.best) is None
    with pytest.raises(CheckpointError, match="does not load"):
        load_weights(paths.best)


def test_blocks_are_heeded_and_may_end_the_writing(paths, monkeypatch):
    save_weights(paths.best, weights(1), facts(1))
    seen = []
    save_weights(paths.final, weights(2), facts(2), seen.append)
    assert sum(seen) == paths.final.stat().st_size

    def stop(size):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_weights(paths.best, weights(2), facts(2), stop)
    assert step_of(paths.best) == 1
    assert export.load_weights(paths.best)["validation"] == {"loss": 1.0}
