"""What the record costs the training: a line of metrics, steps beside a sender that is busy, the start of a process.

    python benchmarks/tracking.py            with MLflow's server of the tests (scripts/test.sh installs it)

Steps of about 100 ms alternate, in one process, between blocks that log each step and blocks that do not, while the
sender sends to a real server; compared are the medians of each.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.servers.mlflow import running
from wmtp_worker.settings import load
from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.tracking.metrics import MetricsLog
from wmtp_worker.tracking.record import TrackedRun
from wmtp_worker.tracking.session import Tracking

BLOCKS, STEPS = 10, 10
VALUES = {f"number_{index}": 1 / (index + 1) for index in range(20)} | {"head_loss": [1.5, 1.6, 1.7, 1.8]}


def work(size: int) -> Callable[[], object]:
    """A step: two products of matrices."""
    matrix = np.random.default_rng(0).random((size, size), dtype=np.float32)
    return lambda: matrix @ matrix @ matrix


def timed(step: Callable[[], object]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    results: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, running() as server:
        os.environ.update(server.environ)
        with MetricsLog(Path(folder) / "alone.jsonl", 0) as metrics:
            costs = [timed(lambda: metrics.write("train", 1, **VALUES))[0] for _ in range(5000)]
            results["line_microseconds"] = statistics.median(costs) * 1e6
        paths = RunPaths(Path(folder), "run")
        paths.checkpoints.mkdir(parents=True)
        settings = load(overrides=[f"tracking.uri={server.uri}"], environ={}).tracking
        record = TrackedRun(run="run", experiment="benchmark", settings_digest="d")
        step, number = work(1400), 0
        blocks: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        with MetricsLog(paths.metrics, 0) as metrics:
            tracking = Tracking(settings, paths, record)
            results["enter_seconds"] = timed(lambda: tracking.__enter__())[0]
            for block in range(2 * BLOCKS):
                logs = block % 2 == 0
                for _ in range(STEPS):
                    number += 1

                    def one(logs: bool = logs, number: int = number) -> None:
                        step()
                        if logs:
                            metrics.write("train", number, **VALUES)

                    blocks[logs].append(timed(one))
            results["leave_seconds"] = timed(lambda: tracking.__exit__(None, None, None))[0]
        for name, column in (("wall", 0), ("cpu", 1)):
            with_, without = (statistics.median(one[column] for one in blocks[logs]) for logs in (True, False))
            results[f"step_{name}_milliseconds"] = without * 1e3
            results[f"step_{name}_ratio"] = with_ / without
    print(json.dumps({name: round(value, 4) for name, value in results.items()}, indent=1))


if __name__ == "__main__":
    main()
