"""The tokenizer, and problems turned into token ids."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import numpy.typing as npt

from wmtp_worker.data.problems import Problem, Solution
from wmtp_worker.data.sentencepiece import TOKENIZER_MODEL, from_sentencepiece
from wmtp_worker.data.template import prompt
from wmtp_worker.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FOLDER = "tokenizer"  # beside the weights
PACKAGED = Path(str(files("wmtp_worker") / "data" / "tokenizer"))


@dataclass(frozen=True)
class Sample:
    """One solution as tokens: `ids` int32 of shape [length], of which the first `prompt_length` are not trained on.

    `problem` numbers what it solves, the same for all solutions of one problem; `reward` is 1 for a correct solution,
    0 for an incorrect one, NaN where that is not known.
    """

    ids: npt.NDArray[np.int32]
    prompt_length: int
    problem: int = 0
    reward: float = math.nan


def load_tokenizer(path: Path) -> "PreTrainedTokenizerFast":
    """A fast tokenizer from `tokenizer.json`, SentencePiece's `tokenizer.model` or a GGUF file, in this order.

    `path`: a folder that holds it, itself or in its folder `tokenizer`, or the GGUF file itself. Raises `InputError`
    where that cannot be.
    """
    try:
        tokenizer = _read(path)
    except InputError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception for a malformed file
        raise InputError(f"the tokenizer does not load: {error}", where=str(path), fix="replace its files") from error
    if tokenizer.eos_token_id is None:
        raise InputError(
            "the tokenizer names no eos_token",
            where=str(tokenizer_files(path)[0].with_name("tokenizer_config.json")),
            fix='add "eos_token": without it no response would ever end',
        )
    return tokenizer


def _read(path: Path) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    found = tokenizer_files(path)
    if not found:
        raise InputError(
            f"no tokenizer.json, no {TOKENIZER_MODEL}",
            where=f"folder {path}",
            fix="set model.tokenizer to a folder that holds one",
        )
    folder, name = found[0].parent, found[0].name
    if name == "tokenizer.json":
        tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
        return tokenizer
    if name == TOKENIZER_MODEL:
        return from_sentencepiece(found[0])
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(folder, gguf_file=name, local_files_only=True)
    return cast("PreTrainedTokenizerFast", made)


def tokenizer_files(path: Path) -> list[Path]:
    """The files that `load_tokenizer` reads, the telling one first: beside the weights, else in a folder there."""
    return _files_in(path) or _files_in(path / FOLDER)


def _files_in(path: Path) -> list[Path]:
    # the two configuration files name bos and eos
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    if (path / "tokenizer.json").is_file():
        return [path / name for name in names if (path / name).is_file()]
    if (path / TOKENIZER_MODEL).is_file():
        return [path / TOKENIZER_MODEL]
    return [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf"))[:1]


def digest(path: Path) -> str:
    """SHA-256 (hex) of the tokenizer: two runs with equal digests see equal tokens."""
    total = hashlib.sha256()
    for file in tokenizer_files(path):
        with file.open("rb") as content:
            total.update(f"{file.name}\0{hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def encode(
    tokenizer: "PreTrainedTokenizerFast", problem: Problem, solution: Solution | None = None, number: int = 0
) -> Sample:
    """`<s> prompt response </s>` of a solution of problem `number`; without one, of the problem's first.

    Prompt and response are tokenised apart, so that no token spans the border.
    """
    solution = solution or problem.solutions[0]
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    # a "</s>" inside somebody's code is text, not the end of the response
    as_text = {"add_special_tokens": False, "split_special_tokens": True}
    prompt_ids = bos + tokenizer(prompt(problem), **as_text)["input_ids"]
    response_ids = tokenizer(solution.code, **as_text)["input_ids"]
    ids = np.asarray([*prompt_ids, *response_ids, tokenizer.eos_token_id], dtype=np.int32)
    return Sample(ids, len(prompt_ids), number, math.nan if solution.correct is None else float(solution.correct))


def encode_all(
    tokenizer: "PreTrainedTokenizerFast",
    problem: Problem,
    number: int,
    solutions: Literal["correct", "all"] = "correct",
) -> Iterator[Sample]:
    """The problem's Python (or math) solutions that are known to be correct, or all whose label is known, in order."""
    for solution in problem.solutions:
        if solution.language == "python" and (solution.correct or (solutions == "all" and solution.correct is False)):
            yield encode(tokenizer, problem, solution, number)
