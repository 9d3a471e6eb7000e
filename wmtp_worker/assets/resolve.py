"""A name or a path, turned into a local folder. Nothing is fetched here: see `fetch`."""

import hashlib
import os
from importlib.resources import files
from pathlib import Path

from wmtp_worker.data.files import sha256
from wmtp_worker.data.formats import files_of
from wmtp_worker.data.tokenizer import PACKAGED as PACKAGED_TOKENIZER
from wmtp_worker.errors import InputError
from wmtp_worker.settings import Settings
from wmtp_worker.storage.layout import AssetKind, asset_dir, asset_name

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
    wanted = settings.model.path
    if wanted is None:
        return None
    return _existing(settings, wanted, "models", "model.path", "a name under <workdir>/models")


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


def dataset_digest(folder: Path) -> str:
    """SHA-256 (hex) over the files that training and validation are read from."""
    total = hashlib.sha256()
    for path in files_of(folder, ("train", "validation")):
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
