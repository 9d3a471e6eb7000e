"""What the benchmarks share: where results go, and on what machine they were made."""

import json
import os
import platform
import statistics
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from wmtp_worker.host.limits import cpu_limit

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Facts that the numbers depend on; no host names."""
    import torch

    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cores": cpu_limit(),
        "cpu": next(
            (
                line.split(":")[1].strip()
                for line in Path("/proc/cpuinfo").read_text().splitlines()
                if "model name" in line
            ),
            platform.processor(),
        ),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 2),
    }


def record(name: str, result: dict[str, Any]) -> None:
    """Print the result and keep it."""
    document = {"command": " ".join(["python", *sys.argv]), "machine": machine(), **result}
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(document, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print(text)


def median(values: list[float]) -> float:
    return round(statistics.median(values), 4)


def mbpp() -> Path:
    """The real MBPP file, or the end of the script with what to set."""
    folder = os.environ.get("WMTP_TEST_DATA")
    if not folder or not (path := Path(folder, "mbpp", "mbpp.jsonl")).is_file():
        sys.exit("set WMTP_TEST_DATA to a folder that holds mbpp/mbpp.jsonl")
    return path.resolve()
