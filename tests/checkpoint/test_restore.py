"""Which checkpoint is gone on from, and that its bytes are read once and never used unless they verify."""

import pytest
import torch

from wmtp_worker.checkpoint import restore, store
from wmtp_worker.checkpoint.manifest import SHARED
from wmtp_worker.checkpoint.snapshot import FROZEN, MODEL, OPTIMIZER
from wmtp_worker.errors import CheckpointError, Interrupted


@pytest.fixture
def two(paths, snapshot):
    """Steps 1 and 2 on the disk; both refer to the same frozen tensors."""
    for step in (1, 2):
        store.write(paths, snapshot(step, frozen={"f": torch.full((9,), 7.0)}))


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def values(tensors):
    return {name: set(value.float().tolist()) for name, value in tensors.items()}


def test_every_byte_is_read_once(two, paths, monkeypatch):
    sizes = []
    checkpoint = restore.find(paths, "auto", heed=sizes.append)
    monkeypatch.setattr(restore, "load_file", None)  # nothing is read again
    assert sum(sizes) == checkpoint.manifest.bytes
    assert values(checkpoint.model_tensors()) == {"w": {2.0}, "b": {2.0}, "f": {7.0}}
    assert values(checkpoint.tensors(OPTIMIZER)) == {"exp_avg/w": {2.0}}


def test_the_tensors_are_the_callers(two, paths):
    checkpoint = restore.find(paths, "auto")
    before = (paths.step(2) / MODEL).read_bytes()
    for _ in range(2):  # the second time from the file
        tensors = checkpoint.tensors(MODEL)
        assert values(tensors) == {"w": {2.0}, "b": {2.0}}
        for value in tensors.values():
            value.fill_(-1)
    assert (paths.step(2) / MODEL).read_bytes() == before


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, "state.json"])
def test_nothing_of_a_damaged_checkpoint_is_used(two, paths, name, caplog):
    flip(paths.step(2) / name)
    checkpoint = restore.find(paths, "auto")
    assert checkpoint.manifest.step == 1
    assert values(checkpoint.model_tensors()) == {"w": {1.0}, "b": {1.0}, "f": {7.0}}
    assert values(checkpoint.tensors(OPTIMIZER)) == {"exp_avg/w": {1.0}}
    assert f"passed over checkpoint step_2: {name} was changed: its SHA-256 differs" in caplog.text
    assert (paths.step(2) / name).exists()
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        restore.find(paths, 2)


def test_damaged_frozen_tensors_are_not_used(two, paths):
    flip(next((paths.checkpoints / SHARED).iterdir()))
    assert restore.find(paths, "auto") is None


def test_only_what_is_wanted_is_kept(two, paths):
    checkpoint = restore.find(paths, 2, read=(MODEL, FROZEN))
    assert {path.name for path in checkpoint.loaded if path.parent.name != SHARED} == {MODEL}
    assert values(checkpoint.tensors(OPTIMIZER)) == {"exp_avg/w": {2.0}}  # verified, and read from the file


def test_what_memory_does_not_hold_is_read_one_by_one(two, paths, monkeypatch):
    monkeypatch.setattr(restore, "memory_available", lambda: 6000)
    checkpoint = restore.find(paths, "auto")
    assert {path.name for path in checkpoint.loaded if path.parent.name != SHARED} == set()
    tensors = checkpoint.tensors(MODEL)
    assert (len(tensors), tensors.keys()) == (2, {"w", "b"})
    assert values(tensors) == {"w": {2.0}, "b": {2.0}}
    assert values(checkpoint.model_tensors())["f"] == {7.0}


def test_the_search_may_be_stopped(two, paths):
    def heed(size):
        raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        restore.find(paths, "auto", heed=heed)
