"""Two processes against one: tokens per second of training steps, and what is left of twice as many.

    python benchmarks/ranks.py [--rounds 3] [--steps 12] [--preset local-light]

Each process has one thread. Every round runs one process, two with whole copies, and two with shards, one after the
other; ratios are of the same round. The first steps, which allocate and warm up, are left out. On a machine that is
used otherwise two processes get less than two cores: look at the CPU seconds too.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import median, record

from wmtp_worker.tracking.metrics import read

LEFT_OUT = 2
WAYS = {"one process": (1, 1), "two, copies": (2, 1), "two, shards": (2, 2)}


def run(folder: Path, preset: str, steps: int, processes: int, shards: int) -> tuple[float, float]:
    """Tokens per second of the median step, and CPU seconds of the whole run."""
    settings = (
        f"run.workdir={folder}",
        f"parallel.processes={processes}",
        f"parallel.shards={shards}",
        f"training.max_steps={steps}",
        "training.warmup_steps=1",
        "training.micro_batch_size=4",
        "training.accumulation=2",
        "evaluation.every=0",
        "evaluation.max_batches=2",
        "checkpoint.every=1000000",
        "host.threads=1",
        "host.device=cpu",
    )
    options = [text for value in settings for text in ("--set", value)]
    command = [sys.executable, "-m", "wmtp_worker", "train", "--preset", preset, "--run-name", "ranks", *options]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True, timeout=1800)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    lines = [line for line in read(folder / "logs/ranks/metrics.jsonl") if line["kind"] == "train"][LEFT_OUT:]
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return statistics.median(line["tokens"] / line["seconds"] for line in lines), spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--preset", default="local-light")
    options = parser.parse_args()
    rounds: list[dict[str, tuple[float, float]]] = []
    for number in range(options.rounds):
        found = {}
        for way, (processes, shards) in WAYS.items():
            with tempfile.TemporaryDirectory() as folder:
                found[way] = run(Path(folder), options.preset, options.steps, processes, shards)
            print(f"round {number + 1}  {way}: {found[way][0]:,.0f} tokens/s, {found[way][1]:.0f} CPU s", flush=True)
        rounds.append(found)
    result: dict[str, Any] = {"threads": 1, "preset": options.preset, "steps": options.steps, "ways": {}}
    for way, (processes, _) in WAYS.items():
        ratio = median([found[way][0] / found["one process"][0] for found in rounds])
        result["ways"][way] = {
            "tokens_per_second": round(median([found[way][0] for found in rounds])),
            "speed_up": ratio,
            "efficiency": round(ratio / processes, 3),
            "cpu_seconds": round(median([found[way][1] for found in rounds]), 1),
        }
    record("ranks", {**result, "rounds": rounds})


if __name__ == "__main__":
    main()
