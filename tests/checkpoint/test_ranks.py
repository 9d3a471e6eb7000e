"""Checkpoints of several ranks: real processes over gloo, FSDP2, and every change of their number."""

import json
import os

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from tests.ranks import together
from wmtp_worker.checkpoint import restore, store
from wmtp_worker.checkpoint.manifest import SHARED
from wmtp_worker.checkpoint.optimizer import load_optimizer, optimizer_tensors, read_optimizer
from wmtp_worker.checkpoint.ranks import Pieces, Ranks
from wmtp_worker.checkpoint.saver import Saver
from wmtp_worker.checkpoint.snapshot import FROZEN, MODEL, OPTIMIZER, Snapshot, split_frozen
from wmtp_worker.checkpoint.tensorfile import LiveFile, write_file
from wmtp_worker.errors import CheckpointError, DiskFullError, WorkerError
from wmtp_worker.storage.layout import RunPaths

from .conftest import FACTS


def small_model(world, mesh=None, frozen=False):
    """An odd size, so that the last rank has less, and of the last layer's bias some have nothing."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 13), torch.nn.Tanh(), torch.nn.Linear(13, 3), torch.nn.LayerNorm(3))
    model[0].requires_grad_(not frozen)
    if world > 1:
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh)  # the LayerNorm stays whole, on every rank
    names = {parameter: name for name, parameter in model.named_parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, names, torch.optim.AdamW(trained, lr=0.01)


def take_steps(model, optimizer, steps):
    # the same rows on every rank: the mean gradient is that of one rank alone
    rows = torch.linspace(-1, 1, 35).reshape(5, 7)
    for _ in range(steps):
        model(rows).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def snapshot_of(step, model, names, optimizer):
    for layer in model:  # a frozen layer has no backward after which FSDP2 would shard it again
        if isinstance(layer, FSDPModule):
            layer.reshard()
    trainable, frozen = split_frozen(model.named_parameters())
    tensors = {MODEL: trainable, OPTIMIZER: optimizer_tensors(optimizer, names)}
    return Snapshot(step, tensors, {"state.json": {"step": step}}, FACTS, frozen=frozen)


def whole(tensors):
    return {
        name: value.detach().full_tensor() if hasattr(value, "full_tensor") else value.detach()
        for name, value in tensors.items()
    }


def save(ranks, workdir, mesh, frozen):
    """Train, save in the background with a step in between, and leave the truth beside it."""
    world = ranks.world
    model, names, optimizer = small_model(world, mesh, frozen)
    take_steps(model, optimizer, 2)
    paths = RunPaths(workdir, "run")
    told = []
    with Saver(paths, ranks=ranks, written=lambda step, folder: told.append(step)) as saver:
        snapshot = snapshot_of(2, model, names, optimizer)
        truth = [whole(dict(model.named_parameters())), whole(optimizer_tensors(optimizer, names))]
        truth = [{name: value.clone() for name, value in tensors.items()} for tensors in truth]
        saver.prepare(snapshot.tensors)
        saver.save(snapshot)
        saver.gate()
        take_steps(model, optimizer, 1)
        if world == 1:
            saver.flush()  # several ranks wait instead of taking the newest
        for step in (3, 4, 5):
            saver.save(snapshot_of(step, model, names, optimizer))
            if world == 1:
                saver.flush()
        saver.flush()
        saver.save_now(snapshot_of(6, model, names, optimizer))
    assert told == ([2, 3, 4, 5, 6] if ranks.first else [])
    if ranks.first:
        torch.save(truth, workdir / "truth.pt")


def load(ranks, workdir, mesh, frozen):
    """Restore onto this number of ranks, compare every bit, and train on."""
    paths = RunPaths(workdir, "run")
    world = ranks.world
    checkpoint = restore.find(paths, 2, ranks)
    model, names, optimizer = small_model(world, mesh, frozen)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    trainable, still = split_frozen(model.named_parameters())
    checkpoint.pieces(MODEL).read_into(trainable)
    if still:
        checkpoint.pieces(FROZEN).read_into(still)
    read_optimizer(optimizer, names, checkpoint.pieces(OPTIMIZER), "here")
    truth = torch.load(workdir / "truth.pt", weights_only=True)
    found = [whole(dict(model.named_parameters())), whole(optimizer_tensors(optimizer, names))]
    for wanted, there in zip(truth, found, strict=True):
        assert wanted.keys() == there.keys()
        assert all(torch.equal(wanted[name], there[name]) for name in wanted), world
    take_steps(model, optimizer, 1)
    after = checkpoint_after(paths, ranks)
    values = whole(dict(model.named_parameters()))
    assert all(torch.allclose(values[name], after[name], atol=1e-6) for name in values)  # sums in another order
    if world == checkpoint.manifest.world_size:
        assert all(torch.equal(values[name], after[name]) for name in values)


def checkpoint_after(paths, ranks):
    return restore.find(paths, 3, ranks).model_tensors()


WAYS = {  # folder: ranks that save, replicas of each piece, whether the first layer is frozen
    "one": (1, 1, False),
    "two": (2, 1, True),
    "four": (4, 1, False),
    "two by two": (4, 2, False),
}


def save_and_load_every_way(rank, world, workdir):
    """Every number of ranks saves, and every number loads what each one saved; those left over wait."""
    meshes = {number: DeviceMesh("cpu", torch.arange(number)) for number in (2, 4)}
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    groups = {number: dist.new_group(range(number), backend="gloo") for number in (2, 4)}
    sides = {number: Ranks(rank, number, group) for number, group in groups.items()} | {1: Ranks()}
    for folder, (savers, replicas, frozen) in WAYS.items():
        if rank < savers:
            save(sides[savers], workdir / folder, meshes.get(savers) if replicas == 1 else square, frozen)
        dist.barrier()
        for loaders in (1, 2, 4):
            if rank < loaders:
                load(sides[loaders], workdir / folder, meshes.get(loaders), frozen)
        dist.barrier()


@pytest.mark.slow
def test_every_number_of_ranks_reads_what_another_wrote(tmp_path):
    for folder in WAYS:
        (tmp_path / folder).mkdir()
    together(4, save_and_load_every_way, tmp_path)
    for folder, (world, replicas, frozen) in WAYS.items():
        paths = RunPaths(tmp_path / folder, "run")
        files = sorted(path.name for path in paths.step(2).iterdir())
        assert ("model.rank00001-of-00002.safetensors" in files) == (world == 2)
        if frozen:
            assert len(list((paths.checkpoints / SHARED).iterdir())) == world
        if replicas == 2:  # each piece once: the second replica writes nothing
            assert any("rank00001-of-00004" in name for name in files)
            assert not any("rank00002" in name or "rank00003" in name for name in files)
        # and whole, without any ranks
        checkpoint = restore.find(paths, "auto")
        assert checkpoint.manifest.world_size == world
        model, names, optimizer = small_model(1, None, frozen)
        model.load_state_dict(checkpoint.model_tensors())
        load_optimizer(optimizer, names, checkpoint.tensors(OPTIMIZER), "here")


def fail_on_one(rank, world, workdir, error):
    paths = RunPaths(workdir, "run")
    ranks = Ranks.of_process_group()
    model, names, optimizer = small_model(world, init_device_mesh("cpu", (world,)))
    take_steps(model, optimizer, 1)
    tries = []

    def failing(size):
        if rank == 1 and len(tries) < 2:
            tries.append(1)
            raise error

    with pytest.raises(DiskFullError if isinstance(error, OSError) else WorkerError, match=r"disk is full|sick"):
        store.write(paths, snapshot_of(1, model, names, optimizer), ranks=ranks, heed=failing)
    dist.barrier()
    assert paths.steps() == []
    assert list(paths.checkpoints.iterdir()) == []
    # all go on: the same save succeeds once the trouble is over
    store.write(paths, snapshot_of(1, model, names, optimizer), ranks=ranks)
    dist.barrier()
    assert paths.steps() == [1]
    if rank == 0:
        (paths.step(1) / "model.rank00001-of-00002.safetensors").write_bytes(b"damaged")
    dist.barrier()
    assert restore.find(paths, "auto", ranks) is None  # both see what one found


@pytest.mark.parametrize("error", [OSError(28, os.strerror(28)), WorkerError("sick"), RuntimeError("sick")], ids=str)
def test_where_one_rank_fails_there_is_no_step(tmp_path, error):
    together(2, fail_on_one, tmp_path, error)


def die_on_one(rank, world, workdir):
    ranks = Ranks.of_process_group(timeout_seconds=30)
    model, names, optimizer = small_model(world, init_device_mesh("cpu", (world,)))

    def dying(size):
        if rank == 1:
            os._exit(0)

    with pytest.raises(RuntimeError):
        store.write(RunPaths(workdir, "run"), snapshot_of(1, model, names, optimizer), ranks=ranks, heed=dying)
    os._exit(0)  # the group cannot be taken down any more


def test_where_one_rank_dies_there_is_no_step_and_the_others_do_not_hang(tmp_path):
    together(2, die_on_one, tmp_path)
    assert list(RunPaths(tmp_path, "run").checkpoints.iterdir()) == []


@pytest.mark.parametrize(
    "pieces",
    [
        {"x": {"shape": [4], "offset": [0]}},
        {"x": {"shape": [2], "offset": [1]}},
        {"x": {"shape": [2, 1], "offset": [0, 0]}},
        {"x": {}},
        {"x": {"shape": [2], "offset": [-1]}},
    ],
    ids=["missing", "outside", "dimensions", "nothing", "negative"],
)
def test_pieces_that_make_no_tensor_are_refused(tmp_path, paths, snapshot, pieces):
    file = tmp_path / "x.safetensors"
    write_file(file, LiveFile({"x": torch.ones(2)}, {"pieces": json.dumps(pieces)}), lambda size: None)
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata()
    with pytest.raises((ValueError, KeyError)):
        Pieces([file])


def test_a_missing_ranks_file_is_a_clear_error(paths, snapshot):
    folder = store.write(paths, snapshot(1))
    checkpoint = restore.find(paths, 1)
    write_file(
        folder / "x",
        LiveFile({"w": torch.ones(2)}, {"pieces": json.dumps({"w": {"shape": [4], "offset": [0]}})}),
        lambda size: None,
    )
    (folder / MODEL).unlink()
    (folder / "x").rename(folder / "model.rank00000-of-00002.safetensors")
    manifest = checkpoint.manifest.model_copy(update={"files": {"model.rank00000-of-00002.safetensors": None}})
    with pytest.raises(CheckpointError, match="pieces of w are missing"):
        restore.Checkpoint(folder, manifest).tensors(MODEL)
