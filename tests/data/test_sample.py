"""The sample problems: their format, and that every label is true when the code is run."""

import ast
import difflib
import json
import os
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

SAMPLE_DIR = Path(__file__).resolve().parents[2] / "wmtp_worker" / "data" / "sample"
SPLITS = ("train", "validation")
TYPES = {
    "text": str,
    "code": str,
    "task_id": int,
    "test_setup_code": str,
    "test_list": list,
    "challenge_test_list": list,
    "incorrect_code": list,
}
# standard library without files, clocks, randomness or network
ALLOWED_MODULES = {"collections", "datetime", "math", "re", "string", "unicodedata"}
FORBIDDEN_CALLS = {"open", "input", "print", "eval", "exec", "compile", "__import__"}

# Runs programs one after another in one process. An alarm ends each after its time; it is no Exception,
# so that a program's own "except" cannot swallow it.
RUNNER = """
import json, signal, sys

class Overtime(BaseException):
    pass

def on_alarm(signum, frame):
    raise Overtime

def outcome(source):
    try:
        program = compile(source, "<program>", "exec")
    except SyntaxError as error:
        return f"does not parse: {error}"
    signal.alarm(seconds)
    try:
        exec(program, {"__name__": "program"})
    except Overtime:
        return "overtime"
    except BaseException as error:
        return f"failed: {type(error).__name__}"
    finally:
        signal.alarm(0)
    return "passed"

signal.signal(signal.SIGALRM, on_alarm)
seconds, sources = json.load(sys.stdin)
json.dump([outcome(source) for source in sources], sys.stdout)
"""


@cache
def load(split: str) -> list[dict]:
    text = (SAMPLE_DIR / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.removesuffix("\n").split("\n")]


def everything() -> list[dict]:
    return [problem for split in SPLITS for problem in load(split)]


def codes(problem: dict) -> list[str]:
    return [problem["code"], *problem["incorrect_code"]]


def run(sources: list[str], seconds: int = 2) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-I", "-c", RUNNER],
        input=json.dumps([seconds, sources]),
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    return json.loads(done.stdout)


def wrong_labels(problems: list[dict]) -> list[str]:
    """Run every solution against its problem's tests and describe the ones whose label does not hold."""
    cases = [(problem, code, index == 0) for problem in problems for index, code in enumerate(codes(problem))]
    sources = ["\n".join([code, problem["test_setup_code"], *problem["test_list"]]) for problem, code, _ in cases]
    complaints = []
    for (problem, code, correct), outcome in zip(cases, run(sources), strict=True):
        holds = outcome == "passed" if correct else outcome.startswith("failed")
        if not holds:
            label = "correct" if correct else "incorrect"
            complaints.append(f"task {problem['task_id']}: code labelled {label} {outcome}:\n{code}")
    return complaints


def squeeze(text: str) -> str:
    return " ".join(text.split()).casefold()


@pytest.mark.parametrize("split", SPLITS)
def test_labels_hold_when_the_code_is_run(split):
    complaints = wrong_labels(load(split))
    assert not complaints, "\n\n".join(complaints)


def test_swapped_label_is_noticed():
    problem = load("validation")[0]
    wrong, *others = problem["incorrect_code"]
    swapped = problem | {"code": wrong, "incorrect_code": [problem["code"], *others]}

    complaints = wrong_labels([swapped])

    assert len(complaints) == 2
    assert "labelled correct failed" in complaints[0]
    assert "labelled incorrect passed" in complaints[1]


def test_endless_loop_and_broken_syntax_are_noticed():
    stubborn = "while True:\n    try:\n        pass\n    except Exception:\n        pass"
    overtime, unparsed, passed = run([stubborn, "def f(:", "assert True"], seconds=1)
    assert overtime == "overtime"
    assert unparsed.startswith("does not parse")
    assert passed == "passed"


def test_there_are_enough_problems():
    assert len(load("train")) >= 112
    assert len(load("validation")) >= 16
    assert len(everything()) >= 128


def test_keys_and_types():
    for problem in everything():
        assert {key: type(value) for key, value in problem.items()} == TYPES
        assert problem["text"].startswith("Write a ")
        strings = problem["test_list"] + problem["challenge_test_list"] + problem["incorrect_code"]
        assert all(type(string) is str for string in strings)
        assert 3 <= len(problem["test_list"]) <= 5
        assert all("assert " in test for test in problem["test_list"])
        assert len(problem["incorrect_code"]) >= 2


def test_nothing_occurs_twice():
    for key in ("task_id", "text", "code"):
        counts = Counter(problem[key] for problem in everything())
        assert max(counts.values()) == 1, f"{key} {counts.most_common(1)} occurs twice"
    for problem in everything():
        dumps = {ast.dump(ast.parse(code)) for code in codes(problem)}
        assert len(dumps) == len(codes(problem)), f"task {problem['task_id']} has equal solutions"
    assert min(problem["task_id"] for problem in everything()) == 1


def test_validation_is_no_near_copy_of_train():
    for key in ("text", "code"):
        known = [squeeze(problem[key]) for problem in load("train")]
        for problem in load("validation"):
            near = difflib.get_close_matches(squeeze(problem[key]), known, n=1, cutoff=0.8)
            assert not near, f"task {problem['task_id']} is close to {near}"


def test_code_is_plain_and_needs_only_harmless_modules():
    for problem in everything():
        for code in codes(problem):
            assert "\r" not in code
            assert code == code.strip("\n")
            indents = [line[: len(line) - len(line.lstrip())] for line in code.split("\n")]
            assert all("\t" not in indent and len(indent) % 4 == 0 for indent in indents), code
            for node in ast.walk(ast.parse(code)):
                if isinstance(node, ast.Import):
                    assert {alias.name for alias in node.names} <= ALLOWED_MODULES
                elif isinstance(node, ast.ImportFrom):
                    assert node.module in ALLOWED_MODULES
                elif isinstance(node, ast.Name):
                    assert node.id not in FORBIDDEN_CALLS


def test_both_splits_leave_ascii():
    for split in SPLITS:
        strings = [string for problem in load(split) for string in codes(problem) + problem["test_list"]]
        assert not all(string.isascii() for string in strings)
    assert not all(problem["text"].isascii() for problem in everything())


def test_no_overlap_with_mbpp():
    folder = os.environ.get("WMTP_TEST_DATA")
    if not folder:
        pytest.skip("WMTP_TEST_DATA is not set, so MBPP is not there to compare with")
    lines = (Path(folder) / "mbpp" / "mbpp.jsonl").read_text(encoding="utf-8").splitlines()
    theirs = [json.loads(line) for line in lines if line.strip()]
    assert len(theirs) > 900
    texts = {squeeze(problem["text"]) for problem in theirs}
    solutions = {squeeze(problem["code"]) for problem in theirs}
    for problem in everything():
        assert squeeze(problem["text"]) not in texts
        assert not solutions.intersection(map(squeeze, codes(problem)))
