"""What a data set holds, counted as a stream."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wmtp_worker.data import files, formats
from wmtp_worker.data.problems import Problem

_LABELS = {True: "correct", False: "incorrect", None: "unknown"}


def summarise(folder: Path, format: formats.Format | None = None) -> dict[str, Any]:
    """By split: problems, those with tests, with correct and with incorrect solutions, with both, solutions by label
    and by language, problems by difficulty; and the SHA-256 of each file. JSON-ready. Raises `InputError`.
    """
    splits = formats.splits_of(folder, format)
    paths = formats.files_of(folder, splits, format)
    return {
        "format": format or formats.format_of(paths[0]),
        "files": files.digests(folder, paths),
        "splits": {split: _count(formats.read_split(folder, split, format)) for split in splits},
    }


def _count(problems: Iterator[Problem]) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    labels: Counter[str] = Counter(dict.fromkeys(_LABELS.values(), 0))
    languages: Counter[str] = Counter()
    difficulties: Counter[str] = Counter()
    for problem in problems:
        found = {solution.correct for solution in problem.solutions}
        counts["problems"] += 1
        counts["with_tests"] += bool(problem.tests or problem.stdin_tests or problem.answer)
        counts["with_both"] += {True, False} <= found
        for solution in problem.solutions:
            labels[_LABELS[solution.correct]] += 1
            languages[solution.language] += 1
        difficulties["unknown" if problem.difficulty is None else str(problem.difficulty)] += 1
    by_number = sorted(difficulties.items(), key=lambda item: (not item[0].isdigit(), item[0].zfill(9)))
    return {
        **{name: counts[name] for name in ("problems", "with_tests", "with_both")},
        "solutions": dict(labels),
        "languages": dict(sorted(languages.items())),
        "difficulties": dict(by_number),
    }
