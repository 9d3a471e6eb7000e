"""The layout of the work directory and of the bucket, spelled here and nowhere else.

The work directory mirrors the bucket, so every key below is valid in both::

    models/<name>/…                    the hub's org/name is org--name
    datasets/<name>/…
    checkpoints/<run>/step_1000/…      files, then manifest.json, last
    checkpoints/<run>/final.pt         best_model.pt   heartbeat.json
    logs/<run>/…                       training.log   metrics.jsonl   report.png
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

MANIFEST = "manifest.json"
_STEP = re.compile(r"step_(0|[1-9][0-9]*)")
_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9][A-Za-z0-9_.-]{0,95}")
_ASSET_NAME = re.compile(r"\w[\w.-]*")
_LONGEST_NAME = 200  # bytes: file systems allow 255, and hidden names beside it are longer
AssetKind = Literal["models", "datasets"]
ASSET_KINDS: tuple[AssetKind, ...] = ("models", "datasets")


def step_name(step: int) -> str:
    """The folder name of the checkpoint taken after `step` optimizer steps."""
    return f"step_{step}"


def parse_step(name: str) -> int | None:
    """The step of a checkpoint folder's name, or None where the name is not one."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def is_hub_name(name: str) -> bool:
    """Whether `name` looks like `org/name`, a repository of the Hugging Face hub."""
    # "--" and ".." are not allowed there, so no two repositories share a folder
    return _HUB_NAME.fullmatch(name) is not None and "--" not in name and ".." not in name


def asset_name(name: str) -> str | None:
    """The folder that a model or data set by this name has, locally and in the bucket; None: it is a path, no name.

    One part is its own name, the hub's `org/name` becomes `org--name`.
    """
    if is_hub_name(name):
        return name.replace("/", "--")
    fits = _ASSET_NAME.fullmatch(name) is not None and ".." not in name and len(name.encode()) <= _LONGEST_NAME
    return name if fits else None


def asset_prefix(kind: AssetKind, folder: str) -> str:
    """The prefix in the bucket, ending in `/`, of a model or data set by its folder's name."""
    return f"{kind}/{folder}/"


def asset_dir(workdir: Path, kind: AssetKind, folder: str) -> Path:
    return workdir / kind / folder


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

    def steps(self) -> list[int]:
        """The steps that have a checkpoint folder, ascending; whether they verify is another question."""
        found = (path for path in self.checkpoints.glob("step_*") if path.is_dir())
        return sorted(step for path in found if (step := parse_step(path.name)) is not None)

    def key(self, path: Path) -> str:
        """The key in the bucket of a file, or (ending in `/`) the prefix of a folder, of this run."""
        key = path.relative_to(self.workdir).as_posix()
        return f"{key}/" if path in (self.checkpoints, self.logs) or parse_step(path.name) is not None else key

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
