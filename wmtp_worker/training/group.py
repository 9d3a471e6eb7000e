"""The processes that train one run together: what `torchrun` and `wmtp train` itself start, on one machine or several.

    with join(settings.host.device, settings.parallel.timeout_seconds) as group:
        group.share(batches)      # this rank's part
        group.sum(tensor)         # of all ranks

Without torchrun's variables there is one process, and nothing here communicates.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist

from wmtp_worker.checkpoint.ranks import ALONE, Ranks
from wmtp_worker.errors import SettingsError
from wmtp_worker.host.device import resolve_device

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

log = logging.getLogger(__name__)

T = TypeVar("T")

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Group:
    """One rank among those that train a run together. Every rank must call the same methods in the same order."""

    device: torch.device
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    ranks: Ranks = field(default=ALONE)

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
                fix="start as many processes as there are GPUs: torchrun --nproc-per-node, or host.processes",
            )
        here = torch.device("cuda", local_rank)
        torch.cuda.set_device(here)
    # small things, and whatever is agreed upon, go over gloo
    backend = "cpu:gloo,cuda:nccl" if here.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
    try:
        ranks = Ranks.of_process_group(timeout_seconds)
        yield Group(here, dist.get_rank(), dist.get_world_size(), local_rank, ranks)
    finally:
        dist.destroy_process_group()


def _number(name: str, otherwise: int) -> int:
    text = os.environ.get(name) or str(otherwise)
    if not text.isdecimal():
        raise SettingsError(f"{name}={text!r} is no number", where="environment", fix="start with torchrun")
    return int(text)
