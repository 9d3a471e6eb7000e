"""The tokenizer, and problems turned into token ids."""

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from wmtp_worker.data.mbpp import Problem
from wmtp_worker.data.template import prompt, response
from wmtp_worker.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PACKAGED = Path(str(files("wmtp_worker") / "data" / "tokenizer"))


@dataclass(frozen=True)
class Sample:
    """One problem as tokens: `ids` int32 of shape [length], of which the first `prompt_length` are not trained on."""

    ids: npt.NDArray[np.int32]
    prompt_length: int


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerFast":
    """A fast tokenizer from a folder with `tokenizer.json`. Raises `InputError` where that cannot be."""
    from transformers import PreTrainedTokenizerFast

    if not (folder / "tokenizer.json").is_file():
        raise InputError(
            "no tokenizer.json",
            where=f"folder {folder}",
            fix="set model.tokenizer to a folder that holds one",
        )
    try:
        tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises bare Exception for a malformed file
        raise InputError(
            f"the tokenizer does not load: {error}",
            where=f"folder {folder}",
            fix="replace its tokenizer.json",
        ) from error
    if tokenizer.eos_token_id is None:
        raise InputError(
            "the tokenizer names no eos_token",
            where=str(folder / "tokenizer_config.json"),
            fix='add "eos_token": without it no response would ever end',
        )
    return tokenizer


def digest(folder: Path) -> str:
    """SHA-256 (hex) of the tokenizer: two runs with equal digests see equal tokens."""
    total = hashlib.sha256()
    # the two configuration files name bos and eos
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            total.update(f"{name}\0{hashlib.sha256((folder / name).read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def encode(tokenizer: "PreTrainedTokenizerFast", problem: Problem) -> Sample:
    """`<s> prompt response </s>`; prompt and response are tokenised apart, so that no token spans the border."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    # a "</s>" inside somebody's code is text, not the end of the response
    as_text = {"add_special_tokens": False, "split_special_tokens": True}
    prompt_ids = bos + tokenizer(prompt(problem), **as_text)["input_ids"]
    response_ids = tokenizer(response(problem), **as_text)["input_ids"]
    ids = np.asarray([*prompt_ids, *response_ids, tokenizer.eos_token_id], dtype=np.int32)
    return Sample(ids, len(prompt_ids))
