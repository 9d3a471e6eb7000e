"""What all ranks of a run decide together: a signal may reach only one of them, or reach them between two steps."""

import torch
import torch.distributed as dist


def most(value: float) -> float:
    """The largest `value` of any rank, on every rank; the value itself without a process group.

    A collective: every rank must call it equally often. The least is `-most(-value)`.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return value
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    shared = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return float(shared)


def agree(requested: bool) -> bool:
    """Whether any rank has been asked: all ranks get the same answer, so all stop after the same step."""
    return most(float(requested)) > 0
