"""Where the files of a data set lie, and their records, one at a time.

JSON lines, plain or compressed (`.gz`, `.zst`), and Parquet; no file is ever held in memory. A split is `train.jsonl`
or several `train-….jsonl`, with any of the endings, all in one place, or a folder `train` of them (`data_set`); else
the folder's only file.
"""

import codecs
import gzip
import hashlib
import io
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path, PurePath, PurePosixPath
from typing import IO, Any, TypeVar

from pydantic import ValidationError

from wmtp_worker.data.problems import Record, Split, expected_keys
from wmtp_worker.errors import InputError

MBPP_FILE = "mbpp.jsonl"
ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
_NAMES: dict[str, Split] = {"train": "train", "validation": "validation", "valid": "validation", "test": "test"}
# where the hub's data sets have their files, or those of the configuration that one means
_PLACES = (".", "data", "default", "main", "full")
_LONGEST = 1 << 28  # bytes of one record: no memory holds a file without line ends
_ROWS = 16


def single_file(folder: Path) -> Path | None:
    """The one file of a data set that has only one, for all of its splits."""
    if folder.is_file():
        return folder
    if (folder / MBPP_FILE).is_file():
        return folder / MBPP_FILE
    found = list(_data_files(folder).items())
    return found[0][0] if len(found) == 1 and found[0][1] is None else None


def own_files(folder: Path, split: Split) -> list[Path]:
    """The files of a split, in order; empty if there are none."""
    return [path for path, named in _data_files(folder).items() if named == split]


def data_set(names: Iterable[str]) -> Mapping[str, Split | None]:
    """Those of a folder's files that are the data set, and the split of each; `names` are relative, `/` between parts.

    They lie in one place: the first of ".", "data", "default", "main", "full" that has files named after splits; else
    the only folder that has. Else they are all in the folders named after splits; else those of ".".
    """
    paths = [path for path in map(PurePosixPath, names) if path.name.endswith(ENDINGS) and path.name[0] != "."]
    in_folders = {str(path): split for path in paths if (split := _NAMES.get(str(path.parent)))}
    telling = {str(path.parent) for path in paths if split_of(path) or path.name == MBPP_FILE} - _NAMES.keys()
    place = next((place for place in _PLACES if place in telling), None)
    if place is None and len(telling) == 1:
        place = telling.pop()
    if place is None and in_folders:
        return in_folders
    return {str(path): split_of(path) for path in paths if str(path.parent) == (place or ".")}


def split_of(path: PurePath) -> Split | None:
    """The split that a file is named after: `valid-00000-of-00001.parquet` is one of "validation"."""
    stem = next((path.name.removesuffix(ending) for ending in ENDINGS if path.name.endswith(ending)), path.name)
    return _NAMES.get(stem.split("-")[0])


def missing(folder: Path, split: Split) -> InputError:
    return InputError(
        f"no {split}.jsonl and no {MBPP_FILE}",
        where=f"dataset folder {folder}",
        fix="put files of a known format there (docs/data.md), or set data.dataset to another name or path",
    )


def _data_files(folder: Path) -> dict[Path, Split | None]:
    paths = [path for pattern in ("*", "[!.]*/*") for path in folder.glob(pattern) if path.is_file()]
    found = data_set(path.relative_to(folder).as_posix() for path in paths)
    return {folder / name: split for name, split in sorted(found.items())}


def sha256(path: Path) -> str:
    """In hex, of the file as it lies there."""
    with _reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests(folder: Path, paths: Iterable[Path]) -> dict[str, str]:
    """`sha256` by the name of each file in the data set `folder`, which may be the one file itself."""
    return {path.name if path == folder else path.relative_to(folder).as_posix(): sha256(path) for path in paths}


def records(path: Path) -> Iterator[tuple[bytes | dict[str, Any], str]]:
    """Each line (as bytes) or row (as a dict), and where it stands, for errors. Raises `InputError`."""
    with _reading(path):
        yield from _rows(path) if path.suffix == ".parquet" else _lines(path)


Kind = TypeVar("Kind", bound=Record)


def parse(kind: type[Kind], record: bytes | dict[str, Any], where: str) -> Kind:
    """Raises `InputError` with `where` for an empty or malformed line, and for one that is not UTF-8."""
    try:
        if isinstance(record, dict):
            return kind.model_validate(record)
        return kind.model_validate_json(text_of(record, where))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"malformed problem: {key + ': ' if key else ''}{first['msg']}", where=where, fix=expected_keys(kind)
        ) from None


def text_of(line: bytes, where: str) -> str:
    """Raises `InputError` for an empty line, and for one that is not UTF-8."""
    if not line.strip():
        raise InputError("empty line", where=where, fix="remove the line: one JSON object a line")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 text: {error.reason}", where=where, fix="save the file as UTF-8") from None


def _lines(path: Path) -> Iterator[tuple[bytes, str]]:
    number = 0
    with _opened(path) as file:
        # not `for line in file`: a file without line ends must not fill the memory
        while line := file.readline(_LONGEST):
            number += 1
            where = f"{path}, line {number}"
            if len(line) == _LONGEST:
                raise InputError(f"a line of {_LONGEST >> 20} MB or more", where=where, fix="one JSON object a line")
            if number > 1 or (line := line.removeprefix(codecs.BOM_UTF8)):
                yield line, where


def _opened(path: Path) -> "gzip.GzipFile | IO[bytes]":
    if path.suffix == ".gz":
        return gzip.open(path)
    if path.suffix == ".zst":
        return io.BufferedReader(_pyarrow("pyarrow", path).input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _rows(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    parquet = _pyarrow("pyarrow.parquet", path)
    number = 0
    # a row group is not read ahead: one of Code Contests' is most of a gigabyte
    with parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
        for batch in file.iter_batches(batch_size=_ROWS, use_threads=False):
            for row in batch.to_pylist():
                number += 1
                yield row, f"{path}, row {number}"


def _pyarrow(module: str, path: Path) -> Any:
    try:
        return import_module(module)
    except ImportError:
        raise InputError(
            f"{path.suffix} files are read by pyarrow, which is not installed",
            where=str(path),
            fix=f"{sys.executable} -m pip install pyarrow, or convert the file to JSON lines (.jsonl, .jsonl.gz)",
        ) from None


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What the operating system or a decompressor says of a file, as an `InputError`."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"damaged: {error}", where=str(path), fix="fetch the file again") from None
    except OSError as error:
        if error.strerror is None:  # pyarrow's, for what it cannot decompress
            raise InputError(f"damaged: {error}", where=str(path), fix="fetch the file again") from None
        raise InputError(
            f"cannot be read: {error.strerror}", where=str(path), fix="give the worker's user read access"
        ) from None
    except ValueError as error:
        if type(error).__module__.startswith("pyarrow"):
            raise InputError(f"damaged: {error}", where=str(path), fix="fetch the file again") from None
        raise
