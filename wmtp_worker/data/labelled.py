"""Labelled data sets on the disk: problems in the format of our own, one file a split, and what they were made of.

A split appears by one rename, when it is whole. Until then it is hidden; a process that is killed has lost at most the
problems it was at: the same call goes on behind the last whole line.
"""

import fcntl
import json
import logging
import os
import platform
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import wmtp_worker
from wmtp_worker.data import files, formats
from wmtp_worker.data.label import Labelling, label
from wmtp_worker.data.problems import SPLITS, Split, dump
from wmtp_worker.errors import InputError
from wmtp_worker.host.sandbox import Sandbox

log = logging.getLogger(__name__)

REPORT = "label.json"
VERSION = 1
_BEGUN = f".partial-{REPORT}"
_LINE_SECONDS = 10.0


@dataclass(frozen=True)
class Work:
    """What becomes what. `poll` is called while waiting and may raise to stop; `progress` hears split and count."""

    source: Path
    folder: Path
    asked: Labelling
    format: formats.Format | None = None
    poll: Callable[[], None] = lambda: None
    progress: Callable[[Split, int], None] = lambda split, done: None


def write_labelled(work: Work, sandbox: Sandbox) -> dict[str, Any]:
    """Label every split of the source into the folder; return the report, which is written into it last.

    The same call, repeated, goes on where it was interrupted; what execution said (`said`) is then that of the last
    call. Raises `InputError` for a folder that holds something else, or that another process writes.
    """
    splits = formats.splits_of(work.source, work.format)
    made_of = {
        "format_version": VERSION,
        "worker_version": wmtp_worker.__version__,
        "python": platform.python_version(),
        "sources": files.digests(work.source, formats.files_of(work.source, splits, work.format)),
        "asked": asdict(work.asked),
    }
    _begin(work.folder, made_of)
    said: Counter[str] = Counter()
    for split in splits:
        if not (work.folder / f"{split}.jsonl").exists():
            said += _write_split(work, split, sandbox)
    written = {f"{split}.jsonl": files.sha256(work.folder / f"{split}.jsonl") for split in splits}
    report = {**made_of, "files": written, "said": dict(sorted(said.items()))}
    with (work.folder / _BEGUN).open("w", encoding="utf-8") as file:
        file.write(json.dumps(report, indent=1) + "\n")
        _appear(file, work.folder / REPORT)
    return report


def _begin(folder: Path, made_of: dict[str, Any]) -> None:
    """Note in the folder what it will be; it may hold what the same call has left, or one that came to nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    begun = folder / _BEGUN
    begins = {f".partial-{split}.jsonl" for split in SPLITS}
    if all(path == begun or (path.name in begins and path.stat().st_size == 0) for path in folder.iterdir()):
        begun.write_text(json.dumps(made_of), encoding="utf-8")
        return
    try:
        same = json.loads(begun.read_text(encoding="utf-8")) == json.loads(json.dumps(made_of))
    except (OSError, ValueError):
        same = False
    if not same:
        raise InputError(
            "the folder is not empty, and not the unfinished result of the same data, options and Python",
            where=str(folder),
            fix="name another folder, or delete this one",
        )


def _write_split(work: Work, split: Split, sandbox: Sandbox) -> Counter[str]:
    said: Counter[str] = Counter()
    with (work.folder / f".partial-{split}.jsonl").open("a+b") as file:
        done = _resume(file)
        if done:
            log.info("%s: going on behind %d problems", split, done)
        problems = islice(formats.read_split(work.source, split, work.format), done, None)
        shown = time.monotonic()
        for problem, counts in label(problems, work.asked, sandbox, work.poll):
            said += counts
            done += 1
            file.write(dump(problem).encode() + b"\n")
            work.progress(split, done)
            if time.monotonic() - shown > _LINE_SECONDS:
                file.flush()
                shown = time.monotonic()
                log.info("%s: %d problems", split, done)
        _appear(file, work.folder / f"{split}.jsonl")
    return said


def _resume(file: IO[bytes]) -> int:
    """Cut off half a line; return how many whole ones there are."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise InputError("another process writes there", where=file.name, fix="wait until it has ended") from None
    file.seek(0)
    count = whole = 0
    for line in file:
        if line.endswith(b"\n"):
            count, whole = count + 1, whole + len(line)
    file.truncate(whole)
    return count


def _appear(file: IO[Any], path: Path) -> None:
    """Give a file that is written its final name, durably."""
    file.flush()
    os.fsync(file.fileno())
    os.replace(file.name, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
