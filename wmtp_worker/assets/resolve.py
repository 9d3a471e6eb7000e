"""A name or a path, turned into a local folder. Nothing is fetched here: see `fetch`."""

import hashlib
import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from wmtp_worker.data.files import sha256
from wmtp_worker.data.formats import Format, files_of
from wmtp_worker.data.problems import Split
from wmtp_worker.data.tokenizer import PACKAGED as PACKAGED_TOKENIZER
from wmtp_worker.errors import InputError
from wmtp_worker.settings import Settings
from wmtp_worker.settings.kinds import RUN_NAME
from wmtp_worker.storage.layout import AssetKind, RunPaths, asset_dir, asset_name

SAMPLE_DATASET = "sample"
TOKENIZER_SUFFIX = "--tokenizer"  # of a folder that has a hub model's tokenizer and not its weights


def dataset_folder(settings: Settings) -> Path:
    """The folder (or the single MBPP file) that `data.dataset` means. Raises `InputError` where there is none."""
    wanted = settings.data.dataset
    if wanted == SAMPLE_DATASET:
        return Path(str(files("wmtp_worker") / "data" / "sample"))
    return _existing(settings, wanted, "datasets", "data.dataset", f"{SAMPLE_DATASET}, a name under <workdir>/datasets")


def model_folder(settings: Settings) -> Path | None:
    """The folder that `model.path` means, None where the model is built from settings."""
    return _model(settings, "model.path", settings.model.path)


def reference_folder(settings: Settings) -> Path | None:
    """The model that `weighting.reference` means, None where the family needs none."""
    weighting = settings.weighting
    return _model(settings, "weighting.reference", weighting.reference if weighting.needs_reference else None)


def reward_folder(settings: Settings) -> Path | None:
    """The model that `weighting.critic.reward_model` means, None where none is needed."""
    weighting = settings.weighting
    wanted = weighting.critic.reward_model if weighting.needs_reward_model else None
    return _model(settings, "weighting.critic.reward_model", wanted)


def backbone_folder(settings: Settings) -> Path | None:
    """What the value model begins as: `value.backbone`, else the policy's own; None where that is built."""
    if settings.value.backbone is None:
        return model_folder(settings)
    return _model(settings, "value.backbone", settings.value.backbone)


def missing_value_run(settings: Settings) -> RunPaths | None:
    """The run whose `final.pt` `weighting.critic.value` names, where that is not here."""
    wanted = settings.weighting.critic.value
    if settings.weighting.family != "critic" or wanted is None or not RUN_NAME.fullmatch(wanted):
        return None
    run = RunPaths(settings.run.workdir, wanted)
    return None if run.final.exists() or os.path.exists(wanted) else run


def value_weights(settings: Settings) -> Path | None:
    """The file that `weighting.critic.value` means, None where the family has no value model.

    A run's name or folder stands for its `final.pt`. Raises `InputError` where there is none.
    """
    wanted = settings.weighting.critic.value
    if settings.weighting.family != "critic" or wanted is None:
        return None
    paths = [Path(os.path.expanduser(wanted))]
    if RUN_NAME.fullmatch(wanted):
        paths.insert(0, RunPaths(settings.run.workdir, wanted).checkpoints)
    files = [path / "final.pt" if path.is_dir() else path for path in paths if os.path.exists(path)]
    if files and files[0].is_file():
        return files[0].resolve()
    raise InputError(
        f"weighting.critic.value={wanted!r} is not there",
        where=" and ".join(str(path.absolute()) for path in files or paths),
        fix="set it to the name of a run that trained a value model, to its folder, or to a *.pt file",
    )


def _model(settings: Settings, key: str, wanted: str | None) -> Path | None:
    return None if wanted is None else _existing(settings, wanted, "models", key, "a name under <workdir>/models")


def tokenizer_folder(settings: Settings) -> Path:
    """`model.tokenizer`, else the model's own folder, else the packaged tokenizer."""
    wanted = settings.model.tokenizer
    if wanted is not None:
        return _existing(
            settings, wanted, "models", "model.tokenizer", "a name under <workdir>/models", alone=TOKENIZER_SUFFIX
        )
    return model_folder(settings) or PACKAGED_TOKENIZER


def candidates(workdir: Path, wanted: str, kind: AssetKind, alone: str = "") -> list[Path]:
    """Where a name or path may lie, the first that is there counts: under the work directory, then as a path.

    The hub's `org/name` is looked for as `org--name` too; `alone` is the end of one more folder's name.
    """
    folder = asset_name(wanted)
    names = [wanted] if folder is None else [folder, f"{folder}{alone}", wanted]
    paths = [*(asset_dir(workdir, kind, name) for name in names), Path(os.path.expanduser(wanted))]
    return list(dict.fromkeys(paths))


def dataset_digest(
    folder: Path, format: Format | None = None, splits: Sequence[Split] = ("train", "validation")
) -> str:
    """SHA-256 (hex) over the files that these splits are read from; `format` None: found out."""
    total = hashlib.sha256()
    for path in files_of(folder, splits, format):
        total.update(bytes.fromhex(sha256(path)))
    return total.hexdigest()


def _existing(settings: Settings, wanted: str, kind: AssetKind, key: str, names: str, alone: str = "") -> Path:
    paths = candidates(settings.run.workdir, wanted, kind, alone)
    for path in paths:
        if os.path.exists(path):  # Path.exists raises for names too long
            return path.resolve()
    raise InputError(
        f"{key}={wanted!r} is not there",
        where=" and ".join(str(path.absolute()) for path in paths),
        fix=f"set {key} to {names}, or to a path that exists",
    )
