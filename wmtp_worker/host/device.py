"""Which device to compute on, and with how many threads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from wmtp_worker.errors import SettingsError
from wmtp_worker.host.limits import cpu_limit

if TYPE_CHECKING:
    import torch


def resolve_device(wanted: str) -> torch.device:
    """The device `host.device` names; `auto` takes CUDA, then MPS, then the CPU.

    Raises SettingsError if a device is asked for by name and is not there.
    """
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        return torch.device(next(name for name, found in there.items() if found))
    if wanted not in there:
        raise SettingsError(f"host.device={wanted!r} is no device", fix="set it to one of auto, cpu, cuda, mps")
    if not there[wanted]:
        raise SettingsError(
            f"host.device={wanted!r}, but torch {torch.__version__} finds no such device here",
            fix="set host.device=auto to use what is there, or run where the device is (`wmtp doctor` looks)",
        )
    return torch.device(wanted)


def set_threads(wanted: int, processes: int = 1) -> int:
    """Give torch `wanted` threads and return how many that is.

    0: as many as whole cores we may use, shared with the others of `processes` on this machine.
    """
    import torch

    threads = wanted or max(1, int(cpu_limit() / processes))
    torch.set_num_threads(threads)
    return threads


def describe(device: torch.device) -> dict[str, str | int | float]:
    """Facts worth keeping beside a run: the device, its name and memory in bytes, torch, threads, cores."""
    import torch

    facts: dict[str, str | int | float] = {
        "device": str(device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_limit": cpu_limit(),
    }
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        facts |= {"device_name": found.name, "device_memory": found.total_memory}
    return facts


def make_deterministic(device: torch.device) -> None:
    """Ask CUDA for the same bits in every run; the CPU gives them anyway at equal thread counts.

    Must come before the first CUDA call. Where CUDA has no deterministic kernel, torch warns and goes on; backward
    passes belong into `deterministic_backward`.
    """
    import torch

    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


@contextmanager
def deterministic_backward() -> Iterator[None]:
    """For the backward passes of a training that is deterministic.

    Attention's fused kernels on CUDA have a deterministic backward, and take it only where an operation without one
    would raise instead of warn (ATen's `attention_backward.cu`). Of what else runs backwards here, none does.
    """
    import torch

    if not torch.are_deterministic_algorithms_enabled():
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)
