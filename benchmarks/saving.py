"""Saving a checkpoint (safetensors, synced, hashed, manifest, rename) against `torch.save` of the same state."""

import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import median, record

from wmtp_worker.checkpoint import store
from wmtp_worker.storage.atomic import fsync_path
from wmtp_worker.storage.layout import RunPaths

ROUNDS = 7
TENSORS, WIDTH = 60, 1152  # 80 M parameters; with AdamW's two moments 0.96 GB


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {f"layer.{number}": torch.randn(WIDTH, WIDTH, generator=generator) for number in range(TENSORS)}
    moments = {f"{kind}/{name}": torch.rand_like(weight) for kind in ("m", "v") for name, weight in weights.items()}
    seconds: dict[str, list[float]] = {"checkpoint": [], "torch.save": [], "torch.save + fsync": []}
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
        paths = RunPaths(Path(folder), "saving")
        facts = {"settings_digest": "", "worker_version": "", "torch_version": ""}
        for step in range(ROUNDS):
            snapshot = store.Snapshot(
                step, {"model.safetensors": weights, "optimizer.safetensors": moments}, {"state.json": {}}, facts
            )
            started = time.perf_counter()
            written = store.write(paths, snapshot)
            seconds["checkpoint"].append(time.perf_counter() - started)
            shutil.rmtree(written)
            for name in ("torch.save", "torch.save + fsync"):
                file = Path(folder, "state.pt")
                started = time.perf_counter()
                torch.save({"model": weights, "optimizer": moments}, file)
                if name != "torch.save":
                    fsync_path(file)
                seconds[name].append(time.perf_counter() - started)
                file.unlink()
    medians = {name: median(values) for name, values in seconds.items()}
    size = sum(tensor.nbytes for tensor in (*weights.values(), *moments.values()))
    record(
        "saving",
        {
            "bytes": size,
            "seconds": medians,
            "checkpoint / torch.save": round(medians["checkpoint"] / medians["torch.save"], 2),
            "checkpoint / (torch.save + fsync)": round(medians["checkpoint"] / medians["torch.save + fsync"], 2),
        },
    )


if __name__ == "__main__":
    main()
