"""Real processes of one gloo group, for whatever several ranks do together."""

import multiprocessing
import os
import time
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.servers.processes import free_ports

_IMPORTS = [
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "wmtp_worker.checkpoint.restore",
    "wmtp_worker.training.gradients",
]
_SECONDS = 600  # after which processes that hang are killed


def together(world, job, *arguments):
    """Run `job(rank, world, *arguments)` in `world` processes of one gloo group; fails where one fails or hangs."""
    apart(world, _in_group, job, arguments)


def apart(world, job, *arguments):
    """The same with torchrun's variables instead of a group."""
    (port,) = free_ports(1)
    # one server imports torch, once; the processes are its children
    multiprocessing.set_forkserver_preload(_IMPORTS)
    arguments = (world, port, job, arguments)
    context = mp.start_processes(_start, arguments, nprocs=world, join=False, start_method="forkserver")
    end = time.monotonic() + _SECONDS
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < end, "the processes hang"
    finally:
        for process in context.processes:
            process.kill()
            process.join()


def _start(rank, world, port, job, arguments):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        job(rank, world, *arguments)
    except BaseException:
        traceback.print_exc()  # the first that fails is not the one whose words are reported
        raise


def _in_group(rank, world, job, arguments):
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        job(rank, world, *arguments)
    finally:
        dist.destroy_process_group()
