"""The layout of the work directory and of the bucket, spelled here and nowhere else.

The work directory mirrors the bucket, so nearly every key below is valid in both::

    models/<name>/…                    the hub's org/name is org--name
    datasets/<name>/…
    checkpoints/<run>/step_1000/…      files, then manifest.json, last
    checkpoints/<run>/shared/…         <sha256>.safetensors: frozen tensors that manifests name by their digest
    checkpoints/<run>/final.pt         best_model.pt   heartbeat.json
    logs/<run>/…                       training.log   settings.json   metrics.jsonl   weights.jsonl   ledger.jsonl
                                       report.html
    mlflow/<run>/…                     run.json   servers.json   system.jsonl: what MLflow is told besides the metrics

In the bucket several workers may believe that the run is theirs. So what one publishes there lies under keys that carry
the epoch of its lease (none for epoch 0, that of workers without lease), and the manifest says which::

    checkpoints/<run>/step_1000/manifest.json    step_1000/e7/<file>    shared/e7/<sha256>.safetensors
    checkpoints/<run>/lease.json
    probes/…                           objects by which `wmtp doctor` tries the bucket; gone afterwards

Only in the work directory, and made anew where it is gone::

    cache/scores/<digest>/…            what frozen models say of a data set
    cache/compiled/…                   torch's compiled code
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

MANIFEST = "manifest.json"
SHARED = "shared"  # folder beside the steps
PROBES = "probes/"  # prefix of objects by which a bucket is tried
BLOB = ".safetensors"
_STEP = re.compile(r"step_(0|[1-9][0-9]*)")
_EPOCH = re.compile(r"e([1-9][0-9]*)")
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


def scores_dir(workdir: Path) -> Path:
    return workdir / "cache" / "scores"


def tokens_dir(workdir: Path) -> Path:
    return workdir / "cache" / "tokens"


def compiled_dir(workdir: Path) -> Path:
    return workdir / "cache" / "compiled"


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
        is_folder = path in (self.checkpoints, self.logs, self.tracking) or parse_step(path.name) is not None
        return f"{key}/" if is_folder else key

    @property
    def shared(self) -> Path:
        return self.checkpoints / SHARED

    def blob(self, sha256: str) -> Path:
        """The file of frozen tensors that manifests name by this digest."""
        return self.shared / blob_name(sha256)

    @property
    def keys(self) -> "RunKeys":
        """Where it all is in the bucket."""
        return RunKeys(self.key(self.checkpoints))

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
    def tracking(self) -> Path:
        return self.workdir / "mlflow" / self.run

    @property
    def tracking_record(self) -> Path:
        return self.tracking / "run.json"

    @property
    def tracking_servers(self) -> Path:
        return self.tracking / "servers.json"

    @property
    def system(self) -> Path:
        return self.tracking / "system.jsonl"

    @property
    def tracking_lock(self) -> Path:
        return self.checkpoints / ".tracking.lock"

    @property
    def training_log(self) -> Path:
        return self.record.training_log

    @property
    def metrics(self) -> Path:
        return self.record.metrics

    @property
    def ledger(self) -> Path:
        return self.record.ledger

    @property
    def record(self) -> "RunRecord":
        """The files of `logs`."""
        return RunRecord(self.logs)


@dataclass(frozen=True)
class RunRecord:
    """What a run leaves beside its checkpoints: the files of its logs, wherever their folder lies."""

    folder: Path

    @property
    def training_log(self) -> Path:
        return self.folder / "training.log"

    @property
    def settings(self) -> Path:
        return self.folder / "settings.json"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def weights(self) -> Path:
        return self.folder / "weights.jsonl"

    @property
    def ledger(self) -> Path:
        return self.folder / "ledger.jsonl"

    @property
    def report(self) -> Path:
        return self.folder / "report.html"


def blob_name(sha256: str) -> str:
    """The file name of frozen tensors with this digest, in the folder `shared`."""
    return sha256 + BLOB


@dataclass(frozen=True)
class Place:
    """Whose object a key of a run is: of a step, or (None) shared by several; of an epoch; under a name."""

    step: int | None
    epoch: int
    name: str


@dataclass(frozen=True)
class RunKeys:
    """Every key in the bucket of one run's checkpoints, all below `prefix` (which ends in `/`)."""

    prefix: str

    @property
    def lease(self) -> str:
        return f"{self.prefix}lease.json"

    @property
    def heartbeat(self) -> str:
        return f"{self.prefix}heartbeat.json"

    @property
    def probes(self) -> str:
        """The prefix of objects by which a server is tried."""
        return f"{self.prefix}probe-"

    @property
    def roots(self) -> tuple[str, str]:
        """The prefixes under which all objects are that a `Place` can be told of."""
        return f"{self.prefix}step_", f"{self.prefix}{SHARED}/"

    def step(self, step: int) -> str:
        """The prefix of a step, ending in `/`."""
        return f"{self.prefix}{step_name(step)}/"

    def manifest(self, step: int) -> str:
        return self.step(step) + MANIFEST

    def file(self, step: int, epoch: int, name: str) -> str:
        """A file of the checkpoint that this epoch published."""
        return f"{self.step(step)}{_part(epoch)}{name}"

    def blob(self, epoch: int, sha256: str, suffix: str = BLOB) -> str:
        """Frozen tensors, or a file beside the checkpoint, that manifests of this epoch name by their digest."""
        return f"{self.prefix}{SHARED}/{_part(epoch)}{sha256}{suffix}"

    def place(self, key: str) -> Place | None:
        """Whose object it is; None for what belongs to no step, for manifests, and for markers of empty folders."""
        folder, _, rest = key.removeprefix(self.prefix).partition("/")
        step = parse_step(folder)
        if (step is None and folder != SHARED) or rest in ("", MANIFEST) or rest.endswith("/"):
            return None
        part, slash, name = rest.partition("/")
        epoch = _EPOCH.fullmatch(part) if slash else None
        return Place(step, int(epoch[1]), name) if epoch else Place(step, 0, rest)


def _part(epoch: int) -> str:
    return f"e{epoch}/" if epoch else ""
