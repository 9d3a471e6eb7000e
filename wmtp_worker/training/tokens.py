"""The tokens of a split, made once and mapped from the disk ever after.

    <workdir>/cache/tokens/<digest>/tokens.safetensors

The digest stands for all that they follow from: the data files, the tokenizer, what is asked for, and the code that
makes samples. The file appears whole or not at all, and is used only where its content has the SHA-256 in its header.
Whoever needs the same tokens at the same time waits for them. Nothing else looks into these folders: they may be
deleted.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from wmtp_worker.data.tokenizer import Sample
from wmtp_worker.errors import DiskFullError, InputError
from wmtp_worker.storage.atomic import TEMPORARY_PREFIX, atomic_path
from wmtp_worker.storage.layout import tokens_dir
from wmtp_worker.storage.transfer.locks import file_lock

log = logging.getLogger(__name__)

_FILE = "tokens.safetensors"
_DIGEST = "sha256"
_DTYPES = {
    "ids": torch.int32,  # of one sample after the other
    "lengths": torch.int64,
    "prompt_lengths": torch.int64,
    "problems": torch.int64,
    "rewards": torch.float32,
    "difficulties": torch.int64,  # of each problem
}
_UNKNOWN = torch.iinfo(torch.int64).min  # a difficulty


@dataclass(frozen=True)
class Tokens:
    """The samples of a split, and the difficulty of each of its problems by its number, None where it is not known."""

    samples: list[Sample]
    difficulties: Sequence[int | None]


@dataclass(frozen=True)
class Cache:
    """Where tokens are kept, and what these ones follow from."""

    workdir: Path
    facts: Sequence[object]

    def tokens(self, make: Callable[[], Tokens], poll: Callable[[], None]) -> Tokens:
        """What is cached, else what `make` returns, which is then cached, unless there is no room for it.

        The ids of cached samples are mapped: read when they are looked at. `poll` is called while another process makes
        them, and may raise to stop; so may `make`.
        """
        folder = tokens_dir(self.workdir) / self._digest()
        making, made = False, None
        try:
            with file_lock(folder / ".lock", poll):
                if (found := _read(folder / _FILE)) is not None:
                    return found
                for left in folder.glob(f"{TEMPORARY_PREFIX}*"):
                    left.unlink()  # of a process that was killed: we have the lock
                making = True
                made = make()
                _write(folder / _FILE, made)
                return _read(folder / _FILE) or made
        except (OSError, DiskFullError, InputError) as error:
            if making and made is None:
                raise  # of the data, not of the cache
            log.warning("tokens are not kept for the next time: %s", error)
            return make() if made is None else made

    def _digest(self) -> str:
        facts = ["2", *self.facts, *(f"{name} {version(name)}" for name in ("tokenizers", "transformers"))]
        total = hashlib.sha256(json.dumps(facts).encode())
        for path in sorted(_code(), key=lambda path: path.name):
            total.update(f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
        return total.hexdigest()


def _code() -> Iterator[Path]:
    """Every module of the room that makes samples: no version number that somebody has to remember."""
    return Path(str(files("wmtp_worker") / "data")).glob("*.py")


def _read(path: Path) -> Tokens | None:
    """What is in a file, None where it is not there, not whole or not what was written."""
    try:
        with safe_open(path, "pt") as file:
            stored = {name: file.get_tensor(name) for name in _DTYPES}
            digest = file.metadata()[_DIGEST]
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, KeyError, TypeError):
        log.warning("%s is damaged: made anew", path)
        return None
    if digest != _content_digest(stored):
        log.warning("%s is damaged: made anew", path)
        return None
    ids = stored["ids"].numpy()
    ends = np.cumsum(stored["lengths"].numpy())
    rest = (stored[name].tolist() for name in ("prompt_lengths", "problems", "rewards"))
    samples = [
        Sample(part, prompt_length, problem, reward)
        for part, prompt_length, problem, reward in zip(np.split(ids, ends[:-1]), *rest, strict=True)
    ]
    difficulties = stored["difficulties"].tolist()
    return Tokens(samples, [None if level == _UNKNOWN else level for level in difficulties])


def _write(path: Path, tokens: Tokens) -> None:
    samples = tokens.samples
    if not samples:
        return
    difficulties = [_UNKNOWN if level is None else level for level in tokens.difficulties]
    columns = {
        "ids": torch.from_numpy(np.concatenate([sample.ids for sample in samples])),
        "lengths": torch.tensor([len(sample.ids) for sample in samples]),
        "prompt_lengths": torch.tensor([sample.prompt_length for sample in samples]),
        "problems": torch.tensor([sample.problem for sample in samples]),
        "rewards": torch.tensor([sample.reward for sample in samples], dtype=torch.float32),
        "difficulties": torch.tensor(difficulties),
    }
    with atomic_path(path) as written:
        save_file(columns, written, metadata={_DIGEST: _content_digest(columns)})


def _content_digest(columns: Mapping[str, torch.Tensor]) -> str:
    total = hashlib.sha256()
    for name, dtype in _DTYPES.items():
        column = columns[name]
        total.update(f"{name} {column.dtype == dtype} {list(column.shape)}\n".encode())
        total.update(column.numpy().data)
    return total.hexdigest()
