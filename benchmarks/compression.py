"""zstd on a real checkpoint: how much smaller, how fast, and below which line speed it would pay.

Needs `pip install zstandard`, which the worker itself does not use. Argument: a checkpoint's folder (step_N) of a run
that has learned something, as `benchmarks/mbpp.py` makes.
"""

import sys
import time
from pathlib import Path

import torch
import zstandard
from common import median, record
from safetensors.torch import load_file

ROUNDS = 3


def planes(data: bytes, width: int) -> bytes:
    """The first bytes of all numbers, then the second ones, …: exponents together compress better than mixed."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, width).t().contiguous().numpy().tobytes()


def raw(tensors: list[torch.Tensor]) -> bytes:
    return b"".join(tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors)


def measure(data: bytes, level: int, width: int) -> dict[str, float]:
    """Size as a part of the original, MB/s of CPU time, and the MB/s below which sending compressed is quicker."""
    seconds = []
    for _ in range(ROUNDS):
        started = time.process_time()
        prepared = planes(data, width) if width else data
        compressed = zstandard.ZstdCompressor(level=level).compress(prepared)
        seconds.append(time.process_time() - started)
    part, speed = len(compressed) / len(data), len(data) / 1e6 / median(seconds)
    # one core compressing while the line sends: size / line = part * size / line + size / speed
    return {"part": round(part, 3), "MB/s": round(speed), "pays below MB/s": round(speed * (1 - part))}


def main() -> None:
    folder = Path(sys.argv[1])
    weights = list(load_file(folder / "model.safetensors").values())
    moments = load_file(folder / "optimizer.safetensors")
    first = [tensor for name, tensor in moments.items() if name.startswith("exp_avg/")]
    second = [tensor for name, tensor in moments.items() if name.startswith("exp_avg_sq/")]
    kinds = {
        "weights fp32": (raw(weights), 4),
        "weights bf16": (raw([tensor.to(torch.bfloat16) for tensor in weights]), 2),
        "first moment fp32": (raw(first), 4),
        "second moment fp32": (raw(second), 4),
    }
    results = {}
    for kind, (data, width) in kinds.items():
        for level in (1, 3):
            results[f"{kind}, zstd -{level}"] = measure(data, level, 0)
        results[f"{kind}, byte planes, zstd -1"] = measure(data, 1, width)
    record("compression", {"bytes": {kind: len(data) for kind, (data, _) in kinds.items()}, **results})


if __name__ == "__main__":
    main()
