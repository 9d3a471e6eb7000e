"""Which format the files of a data set have, and the problems in them, read as a stream."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from wmtp_worker.data import files
from wmtp_worker.data.code_contests import CodeContestsRow
from wmtp_worker.data.gsm8k import Gsm8kRow
from wmtp_worker.data.humaneval import HumanEvalRow
from wmtp_worker.data.mbpp import PUBLIC_SPLIT, MbppRow
from wmtp_worker.data.problems import SPLITS, Problem, Record, Split
from wmtp_worker.errors import InputError

Format = Literal["mbpp", "code_contests", "humaneval", "gsm8k", "labelled"]
FORMATS: tuple[Format, ...] = get_args(Format)

_HELD_OUT = 20  # of GSM8K's training problems, one in so many is for validation


class LabelledRow(Problem):
    """A problem as `wmtp data label` writes it."""

    def problem(self, number: int) -> Problem:
        return self


_ROWS: dict[Format, type[Record]] = {
    # the order in which they are looked for: the first whose keys are all there
    "labelled": LabelledRow,
    "code_contests": CodeContestsRow,
    "humaneval": HumanEvalRow,
    "mbpp": MbppRow,
    "gsm8k": Gsm8kRow,
}
_KEYS: dict[Format, frozenset[str]] = {
    "labelled": frozenset({"id", "statement"}),
    "code_contests": frozenset({"name", "description", "solutions"}),
    "humaneval": frozenset({"prompt", "canonical_solution", "entry_point"}),
    "mbpp": frozenset({"task_id"}),
    "gsm8k": frozenset({"question", "answer"}),
}


@dataclass(frozen=True)
class Part:
    """A split: the files it is in, and which of their problems belong to it."""

    paths: list[Path]
    keep: Callable[[Problem], bool] | None = None  # all


def read_split(folder: Path, split: Split, format: Format | None = None) -> Iterator[Problem]:
    """The problems of one split, in file order, one at a time; `format` None: found out.

    Raises `InputError` for a split that is not there, and, while it is iterated over, naming the file and line that is
    wrong.
    """
    return _problems(_part(folder, split, format), split, format)


def splits_of(folder: Path, format: Format | None = None) -> list[Split]:
    """The splits that a data set has. One file may hold several: those of which it has a problem.

    Raises `InputError` where there is none, and as `read_split` does.
    """
    found = [split for split in SPLITS if (part := find_part(folder, split, format)) and _is_any(part, format)]
    if not found:
        raise _nothing(_part(folder, "train", format).paths[0], "train")
    return found


def files_of(folder: Path, splits: Sequence[Split], format: Format | None = None) -> list[Path]:
    """The files that hold these splits, each once. Raises `InputError` naming what is missing."""
    return list(dict.fromkeys(path for split in splits for path in _part(folder, split, format).paths))


def find_part(folder: Path, split: Split, format: Format | None = None) -> Part | None:
    """Where a split lies; None if this data set has not got it. Raises `InputError` for files of no known format."""
    single = files.single_file(folder)
    if single is not None:
        named = files.split_of(single)
        if named == split:
            return Part([single])
        if single.name == files.MBPP_FILE or (format or format_of(single)) == "mbpp":
            return Part([single], lambda problem: int(problem.id) in PUBLIC_SPLIT[split])
        return Part([single]) if named is None and split == "test" else None
    own, train = files.own_files(folder, split), files.own_files(folder, "train")
    borrowed = split in ("train", "validation") and train and not files.own_files(folder, "validation")
    if borrowed and (format or format_of(train[0])) == "gsm8k":
        return Part(train, lambda problem: held_out(problem) == (split == "validation"))
    return Part(own) if own else None


def _part(folder: Path, split: Split, format: Format | None) -> Part:
    if (part := find_part(folder, split, format)) is None:
        single = files.single_file(folder)
        raise files.missing(folder, split) if single is None else _nothing(single, split)
    return part


def held_out(problem: Problem) -> bool:
    """Whether a training problem is kept for validation, where nothing else is: by its text alone."""
    return hashlib.sha256(problem.statement.encode()).digest()[0] * _HELD_OUT < 256


def format_of(path: Path) -> Format:
    """The format of a file, by the keys of its first record. Raises `InputError`."""
    for record, where in files.records(path):
        keys = _keys(record, where)
        for name, wanted in _KEYS.items():
            if wanted <= keys:
                return name
        raise InputError(
            f"not in a known format: its keys are {', '.join(sorted(keys)) or 'none'}",
            where=where,
            fix=f"set data.format to one of {', '.join(FORMATS)} to hear what is missing; docs/data.md describes them",
        )
    raise _empty(path)


def _keys(record: bytes | dict[str, Any], where: str) -> set[str]:
    if isinstance(record, dict):
        return set(record)
    try:
        document = json.loads(files.text_of(record, where))
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"malformed problem: Invalid JSON: {error}", where=where, fix="one JSON object a line"
        ) from None
    if not isinstance(document, dict):
        raise InputError("malformed problem: not an object", where=where, fix="one JSON object a line")
    return set(document)


def read_file(path: Path, format: Format | None = None) -> Iterator[Problem]:
    """Every problem of a file, whatever its split. Raises `InputError` with file and line."""
    kind = _ROWS[format or format_of(path)]
    number = 0
    for number, (record, where) in enumerate(files.records(path), start=1):
        row: Any = files.parse(kind, record, where)
        yield row.problem(number)
    if number == 0:
        raise _empty(path)


def _is_any(part: Part, format: Format | None) -> bool:
    keep = part.keep
    return keep is None or any(keep(problem) for path in part.paths for problem in read_file(path, format))


def _problems(part: Part, split: Split, format: Format | None) -> Iterator[Problem]:
    found = 0
    for path in part.paths:
        for problem in read_file(path, format):
            if part.keep is None or part.keep(problem):
                found += 1
                yield problem
    if not found:
        raise _nothing(part.paths[0], split)


def _empty(path: Path) -> InputError:
    return InputError("the file is empty", where=str(path), fix="one JSON object a line")


def _nothing(path: Path, split: Split) -> InputError:
    numbers = PUBLIC_SPLIT[split]
    return InputError(
        f"no problem of the {split} split (MBPP: task_id {numbers.start}-{numbers.stop - 1})",
        where=str(path),
        fix="use the whole MBPP file, or a folder with train.jsonl and validation.jsonl",
    )
