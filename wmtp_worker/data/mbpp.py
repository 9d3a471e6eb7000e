"""MBPP's own JSONL format (https://github.com/google-research/google-research/tree/master/mbpp), read strictly.

A dataset is a folder with `train.jsonl` and `validation.jsonl` (and `test.jsonl`), or MBPP's single `mbpp.jsonl`,
whose public split goes by `task_id`: 1-10 prompt, 11-510 test, 511-600 validation, 601-974 train.
"""

import codecs
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from wmtp_worker.errors import InputError

Split = Literal["train", "validation", "test"]

SINGLE_FILE = "mbpp.jsonl"
PUBLIC_SPLIT: dict[Split, range] = {
    "test": range(11, 511),
    "validation": range(511, 601),
    "train": range(601, 975),
}


def _line_feeds(text: str) -> str:
    # MBPP's own code ends in CRLF lines, and in a lone CR where the last one was cut
    return text.replace("\r\n", "\n").replace("\r", "\n")


Text = Annotated[str, AfterValidator(_line_feeds)]


class Problem(BaseModel):
    """One programming problem. `incorrect_code` is this project's own addition: plausible wrong solutions."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    task_id: int
    text: Text = Field(min_length=1)
    code: Text = Field(min_length=1)
    test_list: list[Text] = []
    test_setup_code: Text = ""
    challenge_test_list: list[Text] = []
    incorrect_code: list[Text] = []


def read_split(folder: Path, split: Split) -> list[Problem]:
    """The problems of one split, in file order. Raises `InputError` naming the file and line that is wrong."""
    return [problem for path in split_files(folder, (split,)) for problem in _of_split(path, split)]


def split_files(folder: Path, splits: tuple[Split, ...]) -> list[Path]:
    """The files that hold these splits; `folder` may also be the single file itself."""
    single = folder if folder.is_file() else folder / SINGLE_FILE
    if single.is_file():
        return [single]
    paths = [folder / f"{split}.jsonl" for split in splits]
    for path in paths:
        if not path.is_file():
            raise InputError(
                f"no {path.name} and no {SINGLE_FILE}",
                where=f"dataset folder {folder}",
                fix="put MBPP-format JSONL files there, or set data.dataset to another name or path",
            )
    return paths


def _of_split(path: Path, split: Split) -> list[Problem]:
    problems = read_problems(path)
    if path.stem == split:
        return problems
    chosen = [problem for problem in problems if problem.task_id in PUBLIC_SPLIT[split]]
    if not chosen:
        numbers = PUBLIC_SPLIT[split]
        raise InputError(
            f"no problem of the {split} split (task_id {numbers.start}-{numbers.stop - 1})",
            where=str(path),
            fix="use the whole MBPP file, or a folder with train.jsonl and validation.jsonl",
        )
    return chosen


def read_problems(path: Path) -> list[Problem]:
    """Every line of a JSONL file as a `Problem`, line ends normalised to LF.

    A byte order mark at the start is skipped. Raises `InputError` with file and line number for an empty or malformed
    line and for one that is not UTF-8, and with the file for an empty file.
    """
    problems = []
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                problems.append(_parse(text, f"{path}, line {number}"))
    except OSError as error:
        raise InputError(
            f"cannot be read: {error.strerror}", where=str(path), fix="give the worker's user read access"
        ) from None
    if not problems:
        raise InputError("the file is empty", where=str(path), fix="one JSON object a line")
    return problems


def _parse(line: bytes, where: str) -> Problem:
    if not line.strip():
        raise InputError("empty line", where=where, fix="remove the line: one JSON object a line")
    try:
        return Problem.model_validate_json(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 text: {error.reason}", where=where, fix="save the file as UTF-8") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"malformed problem: {key + ': ' if key else ''}{first['msg']}",
            where=where,
            fix='a line is a JSON object such as {"task_id": 601, "text": "…", "code": "…", "test_list": ["…"]}',
        ) from None
