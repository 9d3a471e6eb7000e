"""200 steps of the ordinary command on MBPP's training split; keeps the report and says how the loss fell."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean

from common import RESULTS, mbpp, record

from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.tracking.metrics import read

RUN = "mbpp"


def main() -> None:
    options = ["--preset", "local-light", "--run-name", RUN, "--set", f"data.dataset={mbpp()}"]
    with tempfile.TemporaryDirectory() as workdir:
        subprocess.run(
            [sys.executable, "-m", "wmtp_worker", "train", *options, *sys.argv[1:]],
            env={**os.environ, "WMTP_WORKDIR": workdir},
            check=True,
        )
        paths = RunPaths(Path(workdir), RUN)
        records = read(paths.metrics)
        RESULTS.mkdir(exist_ok=True)
        shutil.copy(paths.record.report, RESULTS / "mbpp.html")
    losses = [line["loss"] for line in records if line["kind"] == "train"]
    validations = {line["step"]: round(line["loss"], 3) for line in records if line["kind"] == "validation"}
    record(
        "mbpp",
        {
            "steps": len(losses),
            "training loss, first 10 steps": round(fmean(losses[:10]), 3),
            "training loss, last 10 steps": round(fmean(losses[-10:]), 3),
            "validation loss by step": validations,
            "share of a batch that is not padding": round(fmean(r["packing"] for r in records if "packing" in r), 3),
        },
    )


if __name__ == "__main__":
    main()
