"""One rank of a sum over all GPUs: `python -m wmtp_worker.doctor.collective BACKEND WORLD FILE RANK SECONDS`.

Prints `{"sum": WORLD}` if all is well. A process of its own, for what hangs in NCCL can only be killed.
"""

import datetime
import json
import sys


def main(backend: str, world: int, file: str, rank: int, seconds: float) -> None:
    """Join the group through `file` and add up one tensor (shape [1024], float32, all ones) of each rank."""
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        init_method=f"file://{file}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=seconds),
    )
    ones = torch.ones(1024, device=device)
    dist.all_reduce(ones)
    low, high = ones.aminmax()
    print(json.dumps({"sum": low.item() if low == high else None}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), float(sys.argv[5]))
