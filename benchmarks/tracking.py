"""What the record costs the training: a line of metrics, steps beside a busy sender, a whole run; and its report.

    python benchmarks/tracking.py [steps] [run] [report]     with the tests' MLflow server (scripts/test.sh installs it)

`steps`: steps of about 100 ms, in blocks that do not log them, and that log each of them while the server is well,
stalled, or answers 500; a block begins when the sender has nothing left to send. Compared are medians of blocks of the
same round; "again" are blocks that do not log either: what differs without a reason. Steps and sender share one core,
as if the machine had no other; the server, which is elsewhere in life, has the other.
`run`: the smoke run of five steps with and without a server, whole processes that alternate. `report`: the page of a
run of 100,000 steps, made by repeating the lines of a real one.
"""

import argparse
import itertools
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
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the worker does
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # a step is one core's work
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import psutil
from common import median, record

from tests.servers.mlflow import TrackingServer, running
from tests.servers.proxy import Proxy
from wmtp_worker.settings import load
from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.tracking.metrics import MetricsLog, read
from wmtp_worker.tracking.record import TrackedRun, read_servers
from wmtp_worker.tracking.session import Tracking

ROUNDS_OF_BLOCKS, STEPS = 11, 30
STATES = ("not logged", "again", "logged", "stalled", "500")
QUIET = STATES[:2]
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


@contextmanager
def on(core: int) -> Iterator[None]:
    """What this process does and starts meanwhile, it does on that core alone."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(before)[core]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def elsewhere(folder: str) -> Iterator[tuple[TrackingServer, str, Callable[[str], None]]]:
    """A server on another core than what is measured, the address of a proxy before it, and what sets its state."""
    with ExitStack() as stack:
        with on(1):
            server = stack.enter_context(running(f"{folder}/artifacts", {}))
            uri, set_state = stack.enter_context(troubled(server))
        stack.enter_context(on(0))
        yield server, uri, set_state


def caught_up(server: TrackingServer, paths: RunPaths, uri: str, number: int) -> None:
    """Wait until the server has this step."""
    end = time.monotonic() + 300
    while time.monotonic() < end:
        known = read_servers(paths.tracking_servers).get(uri)
        if known is not None and number in server.metrics(known["run_id"]).get("number_0", []):
            return
        time.sleep(0.5)
    raise TimeoutError(f"step {number} does not arrive")


def sender_cpu() -> float:
    """CPU seconds of the process beside this one that sends."""
    of_sender = [child for child in psutil.Process().children() if "wmtp_worker.tracking.sender" in child.cmdline()]
    return sum(sum(child.cpu_times()[:2]) for child in of_sender)


def steps() -> dict[str, Any]:
    results: dict[str, Any] = {}
    # so that requests fail within a block: more often than with the 30 seconds of a worker
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "2"
    with tempfile.TemporaryDirectory() as folder, elsewhere(folder) as (server, uri, set_state):
        os.environ.update(server.environ)
        with MetricsLog(Path(folder) / "alone.jsonl", 0) as metrics:
            lines = [timed(lambda: metrics.write("train", 1, **VALUES))[0] for _ in range(5000)]
            results["a line, microseconds"] = median([cost * 1e6 for cost in lines])
        paths = RunPaths(Path(folder), "run")
        paths.checkpoints.mkdir(parents=True)
        settings = load(overrides=[f"tracking.uri={uri}"], environ={}).tracking
        step, numbers = work(1250), itertools.count(1)
        blocks: dict[str, list[list[float]]] = {state: [] for state in STATES}  # medians: wall, CPU
        with MetricsLog(paths.metrics, 0) as metrics:
            tracking = Tracking(settings, paths, TrackedRun(run="run", experiment="benchmark", settings_digest="d"))
            results["begin, seconds"] = median([timed(lambda: tracking.__enter__())[0]])

            def line() -> int:
                metrics.write("train", number := next(numbers), **VALUES)
                return number

            def logged() -> None:
                step()
                line()

            caught_up(server, paths, uri, line())
            before = sender_cpu()
            for round_ in range(ROUNDS_OF_BLOCKS):
                for state in STATES if round_ % 2 == 0 else reversed(STATES):
                    set_state(state)
                    costs = [timed(step if state in QUIET else logged) for _ in range(STEPS)]
                    blocks[state].append([statistics.median(column) for column in zip(*costs, strict=True)])
                    set_state("well")
                    caught_up(server, paths, uri, last := line())
            results["sender, CPU milliseconds a line"] = round((sender_cpu() - before) / last * 1e3, 3)
            results["end, seconds"] = median([timed(lambda: tracking.__exit__(None, None, None))[0]])
    for column, name in enumerate(("wall", "CPU")):
        plain = [block[column] for block in blocks["not logged"]]
        results[f"a step, {name} milliseconds"] = median([one * 1e3 for one in plain])
        for state in STATES[1:]:
            ratios = [block[column] / base for block, base in zip(blocks[state], plain, strict=True)]
            results[f"{state} / not logged, {name}"] = round(statistics.median(ratios), 4)
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
    for name in chosen:
        record(f"tracking-{name}", PARTS[name]())


if __name__ == "__main__":
    main()
