"""The layout of the work directory and of the bucket, spelled here and nowhere else.

The work directory mirrors the bucket, so every key below is valid in both::

    models/<name>/…
    datasets/<name>/…
    checkpoints/<run>/step_1000/…      files, then manifest.json, last
    checkpoints/<run>/final.pt         best_model.pt   heartbeat.json
    logs/<run>/…                       training.log   metrics.jsonl   report.png
"""

import re
from dataclasses import dataclass
from pathlib import Path

MANIFEST = "manifest.json"
_STEP = re.compile(r"step_(0|[1-9][0-9]*)")


def step_name(step: int) -> str:
    """The folder name of the checkpoint taken after `step` optimizer steps."""
    return f"step_{step}"


def parse_step(name: str) -> int | None:
    """The step of a checkpoint folder's name, or None where the name is not one."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def model_dir(workdir: Path, name: str) -> Path:
    return workdir / "models" / name


def dataset_dir(workdir: Path, name: str) -> Path:
    return workdir / "datasets" / name


@dataclass(frozen=True)
class RunPaths:
    """Every local path of one run."""

    workdir: Path
    run: str

    @property
    def checkpoints(self) -> Path:
        return self.workdir / "checkpoints" / self.run

    def step(self, step: int) -> Path:
        return self.checkpoints / step_name(step)

    @property
    def final(self) -> Path:
        return self.checkpoints / "final.pt"

    @property
    def best(self) -> Path:
        return self.checkpoints / "best_model.pt"

    @property
    def heartbeat(self) -> Path:
        return self.checkpoints / "heartbeat.json"

    @property
    def lock(self) -> Path:
        return self.checkpoints / ".lock"

    @property
    def logs(self) -> Path:
        return self.workdir / "logs" / self.run

    @property
    def training_log(self) -> Path:
        return self.logs / "training.log"

    @property
    def metrics(self) -> Path:
        return self.logs / "metrics.jsonl"

    @property
    def report(self) -> Path:
        return self.logs / "report.png"
