"""What a run does about its saves, apart from the loop: what is counted, and what an error behind it means."""

import threading
import time

import pytest
import torch

from wmtp_worker.checkpoint import store
from wmtp_worker.checkpoint.export import load_weights, save_weights
from wmtp_worker.checkpoint.ledger import Ledger, Phases, read_ledger
from wmtp_worker.checkpoint.snapshot import MODEL, OPTIMIZER, Snapshot
from wmtp_worker.errors import InputError
from wmtp_worker.host.stop import StopRequest
from wmtp_worker.settings import load
from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.training import saving as saving_module
from wmtp_worker.training.bucket import RunBucket
from wmtp_worker.training.saving import Saving

FACTS = {"settings_digest": "", "worker_version": "0", "torch_version": ""}


def snapshot(step):
    tensors = {MODEL: {"w": torch.full((1000,), float(step))}, OPTIMIZER: {"exp_avg/w": torch.zeros(1000)}}
    return Snapshot(step, tensors, {}, FACTS)


@pytest.fixture
def paths(tmp_path):
    return RunPaths(tmp_path, "run")


@pytest.fixture
def make(paths):
    """`make("checkpoint.background=false", …)`: the saves of a run that is kept on this disk alone."""

    def open_(*overrides):
        options = {"run.name": "run", "run.workdir": str(paths.workdir)}
        settings = load(overrides=list(overrides), options=options, environ={})
        bucket = RunBucket(settings, paths, lambda: None)
        ledger = Ledger.begin(paths.ledger, paths.metrics, Phases(), gpus=1)
        saving = Saving(settings, paths, bucket, ledger, None, lambda step, tensors: None, lambda: None)
        saving.prepare(snapshot(0).tensors, {}, 0)
        return saving

    return open_


def saves(paths):
    return [event for event in read_ledger(paths.ledger) if event.event == "save"]


def test_the_ledger_knows_the_whole_pause_and_what_was_saved(make, paths):
    def take():
        time.sleep(0.05)  # the documents are made while the loop stands still
        return snapshot(1)

    with make("checkpoint.background=false") as saving:
        saving.save(take)
    assert saves(paths)[0].pause >= 0.05
    with make() as saving:
        saving.save(lambda: snapshot(2))
        saving.finish()
        saving._saver.save_now(snapshot(3), "trainable")
    assert [(save.step, save.kind) for save in saves(paths)] == [(1, "full"), (2, "full"), (3, "trainable")]
    assert saves(paths)[2].pause > 0


def test_an_old_checkpoint_that_cannot_be_removed_ends_nothing(make, paths, monkeypatch, caplog):
    def refuse(*arguments, **options):
        raise InputError("cannot write step_1: Device or resource busy")

    monkeypatch.setattr(store, "prune", refuse)
    with make() as saving:
        for step in (1, 2):
            saving.save(lambda step=step: snapshot(step))
            saving.finish()
        saving.make_room()
    assert paths.steps() == [1, 2]
    assert "the disk is full, and old checkpoints are not removed" in caplog.text
    assert "old checkpoints are not removed: cannot write step_1" in caplog.text


def test_saves_that_were_replaced_are_forgotten(make):
    with make() as saving:
        for step in range(1, 9):
            saving.save(lambda step=step: snapshot(step))
            saving.gate()
        saving.finish()
        assert saving._begun == {}


def test_a_write_within_one_step_is_no_quiet_step(make):
    told = []
    with make() as saving:
        saving.policy.step = lambda seconds, saving: told.append(saving)
        saving.stepped(1.0)
        saving.save(lambda: snapshot(1))
        saving.gate()
        saving.finish()
        saving.stepped(1.0)
        saving.stepped(1.0)
    assert told == [False, True, False]


def test_a_best_model_that_is_older_than_the_checkpoint_says_is_found_anew(tiny_run, tmp_path):
    best = tiny_run(tmp_path).best_step
    path = RunPaths(tmp_path, "tiny").best
    before = path.read_bytes()
    content = load_weights(path)
    save_weights(path, content.pop("model"), {**content, "step": best - 1})  # the disk was full for the newer one
    assert tiny_run(tmp_path).best_step == best
    assert path.read_bytes() == before


def test_what_is_still_being_written_counts_in_an_emergency(make, paths, monkeypatch):
    asked, planned = {}, threading.Event()
    write, choose = store.write, saving_module.choose

    def slowly(*arguments, **options):
        planned.wait(60)
        return write(*arguments, **options)

    def plan(**facts):
        asked.update(facts)
        planned.set()
        return choose(**facts)

    monkeypatch.setattr(store, "write", slowly)
    monkeypatch.setattr(saving_module, "choose", plan)
    with make("checkpoint.buffers=1") as saving:
        saving.save(lambda: snapshot(1))
        saving.gate()
        while saving._saver.writing is None:
            time.sleep(0.001)
        saving.save(lambda: snapshot(2))  # waits for the only buffer: nobody waits for that before the plan is made
        saving.emergency(lambda: snapshot(3), 3, 2, StopRequest())
    assert asked["unwritten_bytes"] == 8000
    assert asked["queued_bytes"] == 8000
    assert paths.steps() == [1, 3]
