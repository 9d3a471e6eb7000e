"""Checkpoints on the disk: frozen tensors kept once, what is pruned and what never is."""

import json

import pytest
import torch

from wmtp_worker.checkpoint import restore, shared, store
from wmtp_worker.checkpoint.manifest import SHARED, read_manifest, verify
from wmtp_worker.checkpoint.optimizer import expected_tensors, load_optimizer, optimizer_tensors
from wmtp_worker.checkpoint.saver import Saver
from wmtp_worker.checkpoint.shared import SharedTensors
from wmtp_worker.checkpoint.snapshot import FROZEN, MODEL, OPTIMIZER, Snapshot, split_frozen
from wmtp_worker.errors import CheckpointError, DiskFullError
from wmtp_worker.storage.atomic import set_aside

from .conftest import FACTS


def blobs(paths):
    return sorted(path.name for path in (paths.checkpoints / SHARED).glob("*"))


def adapter():
    """A trunk that is frozen, and a little that is trained."""
    torch.manual_seed(0)
    trunk, head = torch.nn.Linear(600, 600), torch.nn.Linear(600, 4)
    trunk.requires_grad_(False)
    model = torch.nn.Sequential(trunk, head)
    names = {parameter: name for name, parameter in model.named_parameters()}
    return model, names, torch.optim.AdamW(head.parameters(), lr=0.01)


def train_step(model, optimizer):
    model(torch.ones(2, 600)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def snapshot_of(step, model, names, optimizer):
    trainable, frozen = split_frozen(model.named_parameters())
    tensors = {MODEL: trainable, OPTIMIZER: optimizer_tensors(optimizer, names)}
    return Snapshot(step, tensors, {}, FACTS, frozen=frozen)


def test_a_frozen_trunk_is_written_once_and_hashed_once(paths, monkeypatch):
    digests = []
    monkeypatch.setattr(shared, "digest_of", lambda source, of=shared.digest_of: digests.append(1) or of(source))
    model, names, optimizer = adapter()
    sizes = []
    with Saver(paths) as saver:
        prepared = saver.prepare({MODEL: split_frozen(model.named_parameters())[0], OPTIMIZER: expected_tensors(names)})
        for step in (1, 2, 3):
            train_step(model, optimizer)
            saver.save(snapshot_of(step, model, names, optimizer))
            saver.flush()
            sizes.append(sum(path.stat().st_size for path in paths.step(step).iterdir()))
    assert prepared == 2 * sum((paths.step(3) / name).stat().st_size for name in (MODEL, OPTIMIZER))
    assert len(digests) == 1
    (blob,) = blobs(paths)
    whole = (paths.checkpoints / SHARED / blob).stat().st_size
    assert max(sizes) < 0.05 * whole
    manifest = read_manifest(paths.step(3))
    assert manifest.shared[FROZEN].sha256 + ".safetensors" == blob
    assert manifest.trainable == "part"

    other, other_names, other_optimizer = adapter()
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    checkpoint = restore.find(paths, "auto")
    other.load_state_dict(checkpoint.model_tensors())
    load_optimizer(other_optimizer, other_names, checkpoint.tensors(OPTIMIZER), "here")
    for each in ((model, optimizer), (other, other_optimizer)):
        train_step(*each)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_another_process_finds_the_blob_that_is_there(paths, snapshot, monkeypatch):
    frozen = {"f": torch.arange(100.0)}
    store.write(paths, snapshot(1, frozen))
    (first,) = blobs(paths)
    when = (paths.checkpoints / SHARED / first).stat().st_mtime_ns
    store.write(paths, snapshot(2, frozen))
    assert blobs(paths) == [first]
    assert (paths.checkpoints / SHARED / first).stat().st_mtime_ns == when


def test_a_tensor_that_was_changed_after_all_gets_another_digest(paths, snapshot):
    frozen, known = {"f": torch.arange(100.0)}, SharedTensors()
    store.write(paths, snapshot(1, frozen), shared=known)
    frozen["f"].add_(1)
    store.write(paths, snapshot(2, frozen), shared=known)
    assert len(blobs(paths)) == 2
    assert [restore.find(paths, step).tensors(FROZEN)["f"][0].item() for step in (1, 2)] == [0, 1]


@pytest.mark.parametrize("damage", ["changed", "missing", "short"])
def test_a_damaged_shared_file_is_noticed(paths, snapshot, damage):
    store.write(paths, snapshot(1, {"f": torch.zeros(100)}))
    blob = paths.checkpoints / SHARED / blobs(paths)[0]
    data = blob.read_bytes()
    if damage == "missing":
        blob.unlink()
    else:
        blob.write_bytes(data[:-1] + b"x" if damage == "changed" else data[:-1])
    with pytest.raises(CheckpointError, match=blob.name):
        verify(paths.step(1))
    assert restore.find(paths, "auto") is None
    store.write(paths, snapshot(2, {"f": torch.zeros(100)}))  # a missing or short one is written anew


def test_pruning_keeps_the_last_the_milestones_and_what_is_on_its_way(paths, snapshot):
    for step in range(1, 11):
        store.write(paths, snapshot(step))
    assert store.prune(paths, 2, 9, spare={5}, keep_every=4) == [1, 2, 3, 6, 7]
    assert paths.steps() == [4, 5, 8, 9, 10]
    assert store.prune(paths, 2, 9, keep_every=4) == [5]


def test_a_checkpoint_without_optimizer_takes_nobodys_place(paths, snapshot):
    for step, kind in ((1, "full"), (2, "full"), (3, "trainable"), (4, "full")):
        store.write(paths, snapshot(step, kind=kind))
    assert store.prune(paths, 2, 4, keep_every=3) == [1]
    store.write(paths, snapshot(5))
    assert store.prune(paths, 2, 5, keep_every=3) == [2, 3]


def test_shared_files_go_with_the_last_manifest_that_names_them(paths, snapshot):
    for step, value in ((1, 1.0), (2, 1.0), (3, 2.0), (4, 3.0)):
        store.write(paths, snapshot(step, {"f": torch.full((9,), value)}))
    named = {step: read_manifest(paths.step(step)).shared[FROZEN].sha256 + ".safetensors" for step in (1, 3, 4)}
    store.prune(paths, 3, 4)
    assert set(blobs(paths)) == set(named.values())
    set_aside(paths.checkpoints, [paths.step(2)])
    store.prune(paths, 1, 4)
    assert set(blobs(paths)) == {named[1], named[4]}  # what is set aside is still whole


def test_no_shared_file_goes_while_a_manifest_cannot_be_read(paths, snapshot):
    for step in (1, 2):
        store.write(paths, snapshot(step, {"f": torch.full((9,), float(step))}))
    (paths.step(1) / "manifest.json").write_text("{")
    assert store.prune(paths, 1, 2) == [1]
    assert len(blobs(paths)) == 1
    store.write(paths, snapshot(3, {"f": torch.full((9,), 3.0)}))
    (paths.step(3) / "manifest.json").write_text("{")
    store.prune(paths, 1, 2)
    assert len(blobs(paths)) == 2


def test_the_sweep_finds_half_written_shared_files(paths, snapshot):
    store.write(paths, snapshot(1, {"f": torch.zeros(9)}))
    (paths.checkpoints / SHARED / ".tmp-x-1").write_bytes(b"half")
    paths.logs.mkdir(parents=True)
    assert store.sweep(paths) == [".tmp-x-1"]
    assert len(blobs(paths)) == 1


def test_a_full_disk_leaves_nothing_half_written(paths, snapshot, monkeypatch):
    def full(path, source, heed):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write_file", full)
    with pytest.raises(DiskFullError):
        store.write(paths, snapshot(1))
    assert list(paths.checkpoints.iterdir()) == []


@pytest.mark.parametrize("name", ["../x", "a/b", ".x"])
def test_a_manifest_names_no_shared_file_outside(paths, snapshot, name):
    store.write(paths, snapshot(1, {"f": torch.zeros(9)}))
    path = paths.step(1) / "manifest.json"
    document = json.loads(path.read_text())
    document["shared"] = {name: document["shared"][FROZEN]}
    path.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="outside its folder"):
        read_manifest(paths.step(1))


def test_the_expected_state_is_the_state_after_a_step():
    model, names, optimizer = adapter()
    train_step(model, optimizer)
    expected, there = expected_tensors(names), optimizer_tensors(optimizer, names)
    assert {key: (value.shape, value.dtype) for key, value in expected.items()} == {
        key: (value.shape, value.dtype) for key, value in there.items()
    }
