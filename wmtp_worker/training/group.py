"""The processes that train one run together: what `torchrun` and `wmtp train` itself start, on one machine or several.

    with join(settings.host.device, timeout_seconds) as group:
        group.share(batches)      # this rank's part
        group.sum(tensor)         # of all ranks
        if group.most(stop.requested): ...

Without torchrun's variables there is one process, and nothing here communicates.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from wmtp_worker.checkpoint.ranks import ALONE, Ranks
from wmtp_worker.errors import Interrupted, SettingsError
from wmtp_worker.host.device import resolve_device

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

log = logging.getLogger(__name__)

T = TypeVar("T")

_TICK = 0.1  # seconds
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class RankLost(Interrupted):
    """Another process of the run has ended, and this one cannot go on alone."""


@dataclass(frozen=True)
class Group:
    """One rank among those that train a run together. Every rank must call the same methods in the same order."""

    device: torch.device
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1  # processes on this machine
    # for whoever calls these methods, in the thread of the training
    ranks: Ranks = field(default=ALONE)
    # for the thread that writes checkpoints: what two threads say must not get mixed up
    writers: Ranks = field(default=ALONE)
    store: Store | None = None

    @property
    def first(self) -> bool:
        """Whether this rank is the one that writes, uploads and talks."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's part of what all have: neighbours; one more for the first ranks where it does not divide."""
        each, more = divmod(len(items), self.world)
        begin = self.rank * each + min(self.rank, more)
        return items[begin : begin + each + (self.rank < more)]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks: the same bits on each, another order of additions than in one process."""
        if self.world > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def most(self, value: float) -> float:
        """The largest `value` of any rank: what one is told of, a stop say, all act upon at the same place."""
        if self.world == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return float(shared)

    def of_first(self, value: T) -> T:
        """What rank 0 has, on every rank. Small things only."""
        return self.ranks.gather(value if self.first else None)[0] if self.world > 1 else value

    def after_first(self, what: str, tick: Callable[[], object] = lambda: None) -> None:
        """Rank 0 has done `what`, which is said once; the others wait for that here, as long as it takes.

        `tick` is called a few times a second meanwhile. Not a collective, which would fail after its time-out. Raises
        `RankLost` where rank 0 is gone.
        """
        if self.store is None:
            return
        with self.company():
            if self.first:
                self.store.set(what, "")
            else:
                while not self.store.check([what]):
                    tick()
                    time.sleep(_TICK)

    @contextmanager
    def company(self) -> Iterator[None]:
        """Raises `RankLost` where what fails inside is that another rank is gone."""
        try:
            yield
        except RuntimeError as error:
            if self.world == 1 or not _is_loss(error):
                raise
            what = "another process of this run has ended"
            raise RankLost(what, fix="its own words say why; the same command goes on from what is saved") from error

    def mesh(self, shards: int) -> "DeviceMesh":
        """All ranks: neighbours hold the `shards` parts of one copy of the model, the others further copies."""
        from torch.distributed.device_mesh import init_device_mesh

        if shards == self.world:
            return init_device_mesh(self.device.type, (shards,), mesh_dim_names=("shard",))
        shape = (self.world // shards, shards)
        return init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard"))


@contextmanager
def join(device: str, timeout_seconds: float) -> Iterator[Group]:
    """Join the other processes, or be alone; leave them in the end.

    A collective that waits longer than `timeout_seconds` fails. Raises `SettingsError` for variables that make no
    group, and a device that is not there.
    """
    world = _number("WORLD_SIZE", 1)
    if world == 1:
        yield Group(resolve_device(device))
        return
    missing = [name for name in _VARIABLES if not os.environ.get(name)]
    if missing:
        raise SettingsError(
            f"WORLD_SIZE={world}, but {', '.join(missing)} not set",
            where="environment",
            fix="start with torchrun, or unset WORLD_SIZE: wmtp train then starts its own processes",
        )
    local_rank = _number("LOCAL_RANK", 0)
    here = resolve_device(device)
    if here.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise SettingsError(
                f"process {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}",
                where="LOCAL_RANK",
                fix="start as many processes as there are GPUs: torchrun --nproc-per-node, or parallel.processes",
            )
        here = torch.device("cuda", local_rank)
        torch.cuda.set_device(here)
    # small things, and whatever is agreed upon, go over gloo
    backend = "cpu:gloo,cuda:nccl" if here.type == "cuda" else "gloo"
    limit = timedelta(seconds=timeout_seconds)
    store, rank, world = next(rendezvous("env://", timeout=limit))
    dist.init_process_group(backend, store=PrefixStore("group", store), rank=rank, world_size=world, timeout=limit)
    try:
        ranks, writers = (Ranks.of_process_group(timeout_seconds) for _ in range(2))
        local_world = _number("LOCAL_WORLD_SIZE", 1)
        yield Group(here, rank, world, local_rank, local_world, ranks, writers, PrefixStore("phases", store))
    finally:
        dist.destroy_process_group()


def _is_loss(error: RuntimeError) -> bool:
    """torch has classes of its own for a few of these only."""
    words = ("gloo", "nccl", "connection", "recvvalue failed", "sendbytes failed", "broken pipe")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)


def _number(name: str, otherwise: int) -> int:
    text = os.environ.get(name) or str(otherwise)
    if not text.isdecimal():
        raise SettingsError(f"{name}={text!r} is no number", where="environment", fix="start with torchrun")
    return int(text)
