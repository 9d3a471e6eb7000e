"""The input pipeline on MBPP: the wait for batches in a step, the start with and without cached tokens, the packing."""

import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
from common import mbpp, median, record
from packing import prefetcher, session

from wmtp_worker.data.packing import pack
from wmtp_worker.data.tokenizer import PACKAGED, load_tokenizer
from wmtp_worker.settings import load
from wmtp_worker.tracking.metrics import read
from wmtp_worker.training.loop import train_step
from wmtp_worker.training.splits import load_split

STEPS, ROUNDS, EPOCHS = 12, 5, 5


def waits(folder: Path) -> float:
    """Median share of a step's wall time that it waits for its batch."""
    made = session(True, folder)
    with prefetcher(made) as ahead:
        for _ in range(STEPS):
            train_step(made, ahead)
    made.metrics.close()
    return median([line["wait"] / line["seconds"] for line in read(made.paths.metrics) if line["kind"] == "train"][1:])


def starts(folder: Path) -> tuple[float, float]:
    """CPU seconds to the training split's tokens, made and from the cache, alternated."""
    made, cached = [], []
    tokenizer = load_tokenizer(PACKAGED)
    for number in range(ROUNDS):
        workdir = {"run.workdir": str(folder / str(number))}
        settings = load(preset="local-light", overrides=[f"data.dataset={mbpp()}"], options=workdir, environ={})
        for taken in (made, cached):
            begun = time.process_time()
            load_split(settings, mbpp(), "train", tokenizer, lambda: None)
            taken.append(time.process_time() - begun)
    return median(made), median(cached)


def first_fit(order: list[int], lengths: list[int], capacity: int) -> int:
    """Rows that first fit needs."""
    rooms: list[int] = []
    for index in order:
        place = next((place for place, room in enumerate(rooms) if lengths[index] <= room), None)
        if place is None:
            rooms.append(capacity - lengths[index])
        else:
            rooms[place] -= lengths[index]
    return len(rooms)


def packings(folder: Path) -> dict[str, dict[str, float]]:
    """Share of positions that are no padding, mean of some epochs, by sequence length."""
    found = {}
    for capacity in (512, 1024):
        options = {"run.workdir": str(folder)}
        overrides = [f"data.dataset={mbpp()}", f"data.sequence_length={capacity}", "model.max_position_embeddings=2048"]
        settings = load(preset="local-light", overrides=overrides, options=options, environ={})
        data = load_split(settings, mbpp(), "train", load_tokenizer(PACKAGED), lambda: None)
        lengths = [len(sample.ids) for sample in data.samples]
        orders = [np.random.default_rng([1234, epoch]).permutation(len(lengths)).tolist() for epoch in range(EPOCHS)]
        rows = {
            "best fit decreasing": [len(pack(order, lengths, capacity)) for order in orders],
            "first fit": [first_fit(order, lengths, capacity) for order in orders],
        }
        found[str(capacity)] = {
            name: round(float(np.mean([sum(lengths) / (count * capacity) for count in counts])), 3)
            for name, counts in rows.items()
        }
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made, cached = starts(folder / "starts")
        result = {
            "share of a step that waits for its batch": waits(folder / "waits"),
            "CPU s to MBPP's training tokens": {"made": made, "cached": cached, "ratio": round(cached / made, 3)},
            "packing": packings(folder / "packing"),
        }
    record("pipeline", result)


if __name__ == "__main__":
    main()
