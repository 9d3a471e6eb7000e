"""A name or a path, turned into a local folder."""

import hashlib
import os
from importlib.resources import files
from pathlib import Path

from wmtp_worker.data.mbpp import split_files
from wmtp_worker.data.tokenizer import PACKAGED as PACKAGED_TOKENIZER
from wmtp_worker.errors import InputError
from wmtp_worker.settings import Settings
from wmtp_worker.storage.layout import dataset_dir, model_dir

SAMPLE_DATASET = "sample"


def dataset_folder(settings: Settings) -> Path:
    """The folder (or the single MBPP file) that `data.dataset` means. Raises `InputError` where there is none."""
    wanted = settings.data.dataset
    if wanted == SAMPLE_DATASET:
        return Path(str(files("wmtp_worker") / "data" / "sample"))
    return _existing(
        wanted,
        dataset_dir(settings.run.workdir, wanted),
        "data.dataset",
        f"{SAMPLE_DATASET}, a name under <workdir>/datasets",
    )


def model_folder(settings: Settings) -> Path | None:
    """The folder that `model.path` means, None where the model is built from settings."""
    wanted = settings.model.path
    if wanted is None:
        return None
    return _existing(wanted, model_dir(settings.run.workdir, wanted), "model.path", "a name under <workdir>/models")


def tokenizer_folder(settings: Settings) -> Path:
    """`model.tokenizer`, else the model's own folder, else the packaged tokenizer."""
    wanted = settings.model.tokenizer
    if wanted is not None:
        return _existing(
            wanted, model_dir(settings.run.workdir, wanted), "model.tokenizer", "a name under <workdir>/models"
        )
    return model_folder(settings) or PACKAGED_TOKENIZER


def dataset_digest(folder: Path) -> str:
    """SHA-256 (hex) over the files that training and validation are read from."""
    total = hashlib.sha256()
    for path in split_files(folder, ("train", "validation")):
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def _existing(wanted: str, named: Path, key: str, names: str) -> Path:
    direct = Path(wanted).expanduser()
    for path in (named, direct):
        if os.path.exists(path):  # Path.exists raises for names too long
            return path.resolve()
    raise InputError(
        f"{key}={wanted!r} is not there",
        where=" and ".join(dict.fromkeys((str(named), str(direct.absolute())))),
        fix=f"set {key} to {names}, or to a path that exists",
    )
