"""What describes a run on a tracking server: experiment, tags and params, all of it without secrets."""

import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wmtp_worker
from wmtp_worker.host.where import here
from wmtp_worker.redact import redact
from wmtp_worker.settings import Settings
from wmtp_worker.tracking.record import TrackedRun

_DIGEST = "sha256 "
_SHORT = 12


def describe(settings: Settings, identity: Mapping[str, Any], device: str, home: str | None) -> TrackedRun:
    """The record of a run that begins now. `identity` has digests of models and data by dotted key; `home` is the
    URL of its checkpoints in a bucket.
    """
    flat = settings.flat()
    digests = {
        key: value.removeprefix(_DIGEST)
        for key, value in identity.items()
        if isinstance(value, str) and value.startswith(_DIGEST)
    }
    params = {key: _text(value) for key, value in flat.items()}
    params |= {f"{key}.sha256": digest for key, digest in digests.items()}
    params["settings.sha256"] = settings.digest()
    if data := digests.get("data.dataset"):
        params["data.version"] = f"{_name(settings.data.dataset)}@{data[:_SHORT]}"
    tags = {
        "algo": settings.weighting.family,
        "horizon": str(settings.model.heads),
        "env": settings.tracking.environment or surroundings(),
        "model_version": settings.tracking.model_version or _model_version(settings, digests),
        "stage": "value" if settings.run.stage == "value" else "policy",
        "recipe": settings.recipe,
        "preset": settings.preset,
        "host": platform.node(),
        "device": device,
        "worker_version": wmtp_worker.__version__,
        "checkpoints": home or str(settings.run.workdir / "checkpoints" / settings.run.name),
        **_origin(),
        **dict(tag.split("=", 1) for tag in settings.tracking.tags),
    }
    return TrackedRun(
        run=settings.run.name,
        experiment=experiment_name(settings),
        home=home,
        settings_digest=settings.digest(),
        best_model=settings.tracking.best_model,
        tags={key: redact(value) for key, value in tags.items()},
        params={key: redact(value) for key, value in params.items()},
    )


def experiment_name(settings: Settings) -> str:
    """`tracking.experiment`, or prefix and recipe."""
    tracking = settings.tracking
    prefix = f"{tracking.experiment_prefix}/" if tracking.experiment_prefix else ""
    return tracking.experiment or f"{prefix}{settings.recipe}"


def surroundings() -> str:
    """Where this process runs: whose machine it is, in a container or on the machine itself."""
    place = here().name
    return f"{place}-container" if os.environ.get("WMTP_IMAGE") or Path("/.dockerenv").exists() else place


def _model_version(settings: Settings, digests: Mapping[str, str]) -> str:
    if settings.model.path is None:
        return "new"
    digest = digests.get("model.path")
    return f"{_name(settings.model.path)}@{digest[:_SHORT]}" if digest else _name(settings.model.path)


def _name(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _text(value: Any) -> str:
    return "null" if value is None else value if isinstance(value, str) else repr(value)


def _origin() -> dict[str, str]:
    """The image and the commit that run, as far as somebody knows them."""
    found = {}
    if digest := os.environ.get("WMTP_IMAGE_DIGEST"):
        found["image"] = digest
    told = os.environ.get("WMTP_GIT_COMMIT", "").replace("unknown", "")  # what an image is built without
    if commit := told or _commit(Path(wmtp_worker.__file__).parents[1]):
        found["mlflow.source.git.commit"] = found["git_commit"] = commit
    return found


def _commit(root: Path) -> str | None:
    if not (root / ".git").exists():  # not that of a repository around it
        return None
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
