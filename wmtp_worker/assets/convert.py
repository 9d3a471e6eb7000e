"""One layout of a model turned into another: Meta's, Hugging Face's, ours."""

import logging
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

from wmtp_worker.data.sentencepiece import TOKENIZER_MODEL
from wmtp_worker.data.tokenizer import load_tokenizer, tokenizer_files
from wmtp_worker.errors import DiskFullError, InputError
from wmtp_worker.host.limits import disk_free
from wmtp_worker.model.folder import write_folder
from wmtp_worker.model.layouts import open_stored
from wmtp_worker.model.meta import write_meta
from wmtp_worker.model.stored import Stored
from wmtp_worker.storage.atomic import disk_errors, fsync_path, publish, temporary

log = logging.getLogger(__name__)

Target = Literal["meta", "hf", "ours"]

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    TOKENIZER_MODEL,
)
_WITH_IT = ("generation_config.json", "LICENSE*", "USE_POLICY*", "NOTICE*")


def convert(
    source: Path,
    destination: Path,
    to: Target,
    tokenizer: Path | None = None,
    poll: Callable[[], None] = lambda: None,
) -> Stored:
    """Write the model at `source` as a new folder in another layout, and open that.

    `hf` keeps head 1 alone, a plain Llama; `ours` and `meta` keep every head. Weights keep their dtype, bit by bit.
    `tokenizer`: the folder with it, if that is not `source`. `poll` is called before each tensor and may raise to stop.
    The folder appears by one rename when all of it is on the disk. Raises `InputError`, also where `tokenizer` has
    none, and `DiskFullError`.
    """
    if destination.exists():
        raise InputError("the folder is there already", where=str(destination), fix="name one that is not there yet")
    if tokenizer is not None and not tokenizer_files(tokenizer):
        what = f"no tokenizer.json, no {TOKENIZER_MODEL}"
        raise InputError(what, where=str(tokenizer), fix="give --tokenizer a folder that holds one")
    stored = open_stored(source)
    _check_room(stored, destination)
    written = temporary(destination)
    with disk_errors(destination.parent):
        try:
            written.mkdir(parents=True)
            if to == "meta":
                write_meta(stored, written, poll)
            else:
                write_folder(stored, written, further_heads=to == "ours", poll=poll)
            _bring_tokenizer(tokenizer or source, written, to)
            for pattern in _WITH_IT if source.is_dir() else ():
                _copy(source.glob(pattern), written)
            for path in [*written.iterdir(), written]:
                fsync_path(path)
            publish(written, destination)
        finally:
            shutil.rmtree(written, ignore_errors=True)
    return open_stored(destination)


def _check_room(stored: Stored, destination: Path) -> None:
    needed = sum(tensor.nbytes for tensor in stored.tensors.mapped.values())
    if (free := disk_free(destination.absolute())) < needed:
        raise DiskFullError(
            f"the model needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
            where=str(destination),
            fix="free some space, or name a folder on a larger disk",
        )


def _bring_tokenizer(source: Path, folder: Path, to: Target) -> None:
    """The tokenizer's files, and fast ones made of them where there are none yet."""
    found = tokenizer_files(source)
    if source.is_dir() and found:
        _copy((path for name in _TOKENIZER_FILES if (path := found[0].with_name(name)).is_file()), folder)
    has_model = (folder / TOKENIZER_MODEL).is_file()
    if to == "meta" and not has_model:
        log.warning("no %s in %s: Meta's own code reads no other tokenizer", TOKENIZER_MODEL, source)
    elif to != "meta" and not found:
        log.warning("no tokenizer in %s: name the folder that has it (--tokenizer)", source)
    elif to != "meta" and not (folder / "tokenizer.json").is_file():
        load_tokenizer(source).save_pretrained(folder)


def _copy(files: Iterable[Path], folder: Path) -> None:
    for path in files:
        shutil.copyfile(path, folder / path.name)
