"""Seconds from the command to the first finished training step: `start.sh --preset smoke`, warm and (`--cold`) cold."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import median, record

ROOT = Path(__file__).parents[1]
ROUNDS = 5
LIMIT = 1200.0


def first_step(environment: dict[str, str]) -> float:
    """Start a run in an empty work directory, wait for its first step, stop it."""
    with tempfile.TemporaryDirectory() as workdir:
        metrics = Path(workdir, "logs", "startup", "metrics.jsonl")
        command = ["bash", str(ROOT / "entrypoint" / "start.sh"), "--preset", "smoke", "--run-name", "startup"]
        started = time.perf_counter()
        process = subprocess.Popen(
            command, env={**os.environ, **environment, "WMTP_WORKDIR": workdir}, stdout=subprocess.DEVNULL
        )
        while not (metrics.exists() and metrics.stat().st_size):
            if process.poll() is not None or time.perf_counter() - started > LIMIT:
                sys.exit(f"no first step (exit code {process.poll()})")
            time.sleep(0.02)
        seconds = time.perf_counter() - started
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
    return seconds


def main() -> None:
    result = {"warm": median([first_step({}) for _ in range(ROUNDS)])}
    if "--cold" in sys.argv:
        with tempfile.TemporaryDirectory() as folder:
            result["cold, packages downloaded"] = round(first_step({"WMTP_VENV": str(Path(folder, "venv"))}), 1)
    record("startup", {"seconds to the first step": result})


if __name__ == "__main__":
    main()
