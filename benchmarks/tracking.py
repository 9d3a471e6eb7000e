"""What the record costs the training: a line of metrics, steps beside a busy sender, a whole run; and its report.

    python benchmarks/tracking.py [steps] [run] [report]     with the tests' MLflow server (scripts/test.sh installs it)

`steps`: steps of about 100 ms, in one process, in blocks that do not log them, and that log them while the server is
well, stalled, or answers 500; each begins when the sender has nothing left to send. Compared are the medians of each.
`run`: the smoke run of five steps with and without a server, whole processes that alternate. `report`: the page of a
run of 100,000 steps, made by repeating the lines of a real one.
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the worker does
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from common import median, record

from tests.servers.mlflow import TrackingServer, running
from tests.servers.proxy import Proxy
from wmtp_worker.settings import load
from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.tracking.metrics import MetricsLog, read
from wmtp_worker.tracking.record import TrackedRun, read_servers
from wmtp_worker.tracking.session import Tracking

ROUNDS_OF_BLOCKS, STEPS = 5, 60
STATES = ("not logged", "logged", "stalled", "500")
VALUES = {f"number_{index}": 1 / (index + 1) for index in range(20)} | {"head_loss": [1.5, 1.6, 1.7, 1.8]}
ROUNDS, LONG = 5, 100_000


def work(size: int) -> Callable[[], object]:
    """A step: two products of matrices."""
    matrix = np.random.default_rng(0).random((size, size), dtype=np.float32)
    return lambda: matrix @ matrix @ matrix


def timed(step: Callable[[], object]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - wall, time.process_time() - cpu


def _proxy(port: int, pipe: Connection) -> None:
    with Proxy("127.0.0.1", port) as proxy:
        pipe.send(proxy.endpoint)
        for state in iter(pipe.recv, None):
            proxy.heal()
            proxy.stalled = state == "stalled"
            if state == "500":
                proxy.answer(500, times=10**9)


@contextmanager
def troubled(server: TrackingServer) -> Iterator[tuple[str, Callable[[str], None]]]:
    """The address of a proxy before the server, in a process of its own, and what sets its state."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_proxy, args=(server.port, theirs))
    process.start()
    try:
        yield ours.recv(), ours.send
    finally:
        ours.send(None)
        process.join(60)


def caught_up(server: TrackingServer, paths: RunPaths, uri: str, number: int) -> None:
    """Wait until the server has this step."""
    end = time.monotonic() + 300
    while time.monotonic() < end:
        known = read_servers(paths.tracking_servers).get(uri)
        if known is not None and number in server.metrics(known["run_id"]).get("number_0", []):
            return
        time.sleep(0.5)
    raise TimeoutError(f"step {number} does not arrive")


def steps() -> dict[str, Any]:
    results: dict[str, Any] = {}
    # so that requests fail within a block: more often than with the 30 seconds of a worker
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "2"
    with (
        tempfile.TemporaryDirectory() as folder,
        running(f"{folder}/artifacts", {}) as server,
        troubled(server) as (uri, set_state),
    ):
        os.environ.update(server.environ)
        with MetricsLog(Path(folder) / "alone.jsonl", 0) as metrics:
            costs = [timed(lambda: metrics.write("train", 1, **VALUES))[0] for _ in range(5000)]
            results["a line, microseconds"] = median([cost * 1e6 for cost in costs])
        paths = RunPaths(Path(folder), "run")
        paths.checkpoints.mkdir(parents=True)
        settings = load(overrides=[f"tracking.uri={uri}"], environ={}).tracking
        step, number = work(1400), 0
        blocks: dict[str, list[tuple[float, float]]] = {state: [] for state in STATES}
        with MetricsLog(paths.metrics, 0) as metrics:
            tracking = Tracking(settings, paths, TrackedRun(run="run", experiment="benchmark", settings_digest="d"))
            results["begin, seconds"] = median([timed(lambda: tracking.__enter__())[0]])
            for round_ in range(ROUNDS_OF_BLOCKS):
                for state in STATES if round_ % 2 == 0 else reversed(STATES):
                    number += 1
                    metrics.write("train", number, **VALUES)
                    caught_up(server, paths, uri, number)
                    set_state(state)
                    for _ in range(STEPS):
                        number += 1

                        def one(logs: bool = state != "not logged", number: int = number) -> None:
                            step()
                            if logs:
                                metrics.write("train", number, **VALUES)

                        blocks[state].append(timed(one))
                    set_state("well")
            results["end, seconds"] = median([timed(lambda: tracking.__exit__(None, None, None))[0]])
    for name, column in (("wall", 0), ("CPU", 1)):
        found = {state: statistics.median(one[column] for one in blocks[state]) for state in STATES}
        results[f"a step, {name} milliseconds"] = round(found["not logged"] * 1e3, 2)
        for state in STATES[1:]:
            results[f"{state} / not logged, {name}"] = round(found[state] / found["not logged"], 4)
    return results


def wmtp(environ: Mapping[str, str], *words: str) -> tuple[float, float]:
    """Seconds and CPU seconds of the program, with all its processes."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-m", "wmtp_worker", *words]
    subprocess.run(command, check=True, capture_output=True, timeout=600, env={**os.environ, **environ})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - began, sum(after[:2]) - sum(before[:2])


def smoke(folder: Path, environ: Mapping[str, str] = {}, count: int = 5) -> tuple[float, float]:
    values = (f"run.workdir={folder}", f"training.max_steps={count}", "logging.every=1", "evaluation.every=2")
    options = [word for value in values for word in ("--set", value)]
    return wmtp(environ, "train", "--preset", "smoke", "--run-name", "run", *options)


def whole_run() -> dict[str, Any]:
    found: dict[str, list[tuple[float, float]]] = {"without": [], "with a server": []}
    with tempfile.TemporaryDirectory() as folder, running(f"{folder}/artifacts", {}) as server:
        given = {**server.environ, "MLFLOW_TRACKING_URI": server.uri}
        for number in range(ROUNDS + 1):
            for way, environ in (("without", {}), ("with a server", given)):
                cost = smoke(Path(folder) / f"{way} {number}", environ)
                if number:  # the first of each fills caches
                    found[way].append(cost)
    added = [[b - a for a, b in zip(*pair, strict=True)] for pair in zip(*found.values(), strict=True)]
    medians = {way: [median([one[column] for one in costs]) for column in (0, 1)] for way, costs in found.items()}
    return {
        "seconds, CPU seconds": medians,
        "added": [median([one[column] for one in added]) for column in (0, 1)],
    }


def report() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        smoke(Path(folder), count=20)
        paths = RunPaths(Path(folder), "run")
        lines = list(read(paths.metrics))
        last = max(line["step"] for line in lines)
        with paths.metrics.open("w", encoding="utf-8") as file:
            for repeat in range(LONG // last):
                for line in lines:
                    if line["kind"] != "validation" or repeat % 10 == 0:
                        file.write(json.dumps({**line, "step": line["step"] + repeat * last}) + "\n")
        costs = [wmtp({"WMTP_WORKDIR": folder}, "report", "run") for _ in range(ROUNDS)]
        return {
            "steps": LONG // last * last,
            "megabytes of metrics": round(paths.metrics.stat().st_size / 1e6, 1),
            "seconds": median([cost[0] for cost in costs]),
            "CPU seconds": median([cost[1] for cost in costs]),
            "bytes of the page": paths.record.report.stat().st_size,
        }


PARTS = {"steps": steps, "run": whole_run, "report": report}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS])
    chosen = parser.parse_args().parts or list(PARTS)
    found = {name: PARTS[name]() for name in chosen}
    if set(chosen) == set(PARTS):
        record("tracking", found)
    else:
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
