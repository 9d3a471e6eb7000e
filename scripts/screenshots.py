"""Makes docs/report*.png: short runs on MBPP (`wmtp data label`, `wmtp train`), their pages, a headless Chromium.

    WMTP_TEST_DATA=/data python scripts/screenshots.py [--work DIR]

Six minutes of one core; what was run is not run again.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from common import mbpp  # noqa: E402

from tests.tracking.browser import Browser, find_chromium  # noqa: E402
from wmtp_worker.data.mbpp import PUBLIC_SPLIT  # noqa: E402
from wmtp_worker.storage.layout import RunPaths  # noqa: E402
from wmtp_worker.training.report import write_report  # noqa: E402

PROBLEMS = {"train": 120, "validation": 24}
RUNS = {"baseline": "baseline", "critic": "critic"}  # and their recipes
CHOSEN = "critic"
SETTINGS = {
    "data.dataset": "pairs",
    "data.sequence_length": 256,
    "model.heads": 4,
    "model.hidden_size": 128,
    "model.intermediate_size": 384,
    "model.layers": 4,
    "training.max_steps": 150,
    "training.micro_batch_size": 2,
    "training.accumulation": 1,
    "training.lr": 2e-3,
    "training.warmup_steps": 10,
    "weighting.warmup": 20,
    "value.max_steps": 80,
    "value.evaluation_every": 20,
    "evaluation.every": 15,
    "checkpoint.every": 50,
    "host.price_per_hour": 0.6,
    "host.threads": 1,
}


def wmtp(work: Path, *words: str) -> None:
    """Run the program; its failure is the script's."""
    subprocess.run(
        [sys.executable, "-m", "wmtp_worker", *words],
        env={**os.environ, "WMTP_WORKDIR": str(work), "OMP_WAIT_POLICY": "PASSIVE"},
        cwd=ROOT,
        check=True,
    )


def data(work: Path) -> None:
    """The first problems of MBPP's splits, with wrong solutions that were executed and failed."""
    if (work / "datasets" / "pairs" / "label.json").exists():
        return
    source = work / "datasets" / "mbpp"
    source.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in mbpp().read_text(encoding="utf-8").splitlines()]
    for split, count in PROBLEMS.items():
        some = [row for row in rows if row["task_id"] in PUBLIC_SPLIT[split]][:count]
        (source / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    wmtp(work, "data", "label", str(source), str(work / "datasets" / "pairs"), "--mutations", "2")


def train(work: Path) -> None:
    settings = [word for name, value in SETTINGS.items() for word in ("--set", f"{name}={value}")]
    for run, recipe in RUNS.items():
        if not RunPaths(work, run).final.exists():
            wmtp(work, "train", "--preset", "local-light", "--recipe", recipe, "--run-name", run, *settings)


def pictures(work: Path) -> None:
    """The page of a run on a desk and on a phone, and the token weights of a comparison."""
    binary = find_chromium()
    if binary is None:
        sys.exit("there is no Chromium: apt-get install chromium")
    one, several = work / "report.html", work / "comparison.html"
    write_report([RunPaths(work, CHOSEN).record], one)
    write_report([RunPaths(work, run).record for run in RUNS], several)
    with Browser(binary) as browser:
        browser.open(one, 1200)
        browser.screenshot(ROOT / "docs" / "report.png", 1120)
        browser.open(one, 390, dark=True)
        browser.screenshot(ROOT / "docs" / "report-phone.png", 1500)
        browser.open(several, 1200)
        browser.evaluate("document.querySelector('label[for=moment1]').click()")
        browser.evaluate("document.activeElement.blur()")
        top = browser.evaluate("document.querySelector('#weights').getBoundingClientRect().top + scrollY")
        browser.screenshot(ROOT / "docs" / "report-weights.png", 1100, top)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="a work directory to keep (a temporary one)")
    given = parser.parse_args().work
    with tempfile.TemporaryDirectory() as temporary:
        work = (given or Path(temporary)).absolute()
        data(work)
        train(work)
        pictures(work)


if __name__ == "__main__":
    main()
