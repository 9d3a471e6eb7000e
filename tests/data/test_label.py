"""Labels by execution: what is run, what its tests say, and what is written down, however often it is interrupted."""

import hashlib
import json
import os
from collections import Counter
from pathlib import Path

import pytest

from wmtp_worker.data.formats import read_file, read_split
from wmtp_worker.data.label import Labelling, label
from wmtp_worker.data.labelled import Work, write_labelled
from wmtp_worker.data.problems import Problem, Solution, dump
from wmtp_worker.data.summary import summarise
from wmtp_worker.errors import InputError, Interrupted
from wmtp_worker.host.sandbox import Exchange, Limits, Sandbox

SAMPLE = Path(__file__).parents[2] / "wmtp_worker" / "data" / "sample"
QUICK = Limits(cpu_seconds=1)
RIGHT, WRONG, SLOW, STRANGE = (
    "def f(a, b):\n    return a + b",
    "def f(a, b):\n    return a - b",
    "def f(a, b):\n    while True:\n        pass",
    "import numpy",
)
TESTS = ["assert f(1, 2) == 3", "assert f(2, 2) == 4"]


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(2) as sandbox:
        yield sandbox


def problem(*solutions: Solution, **changes: object) -> Problem:
    return Problem(**{"id": "p", "statement": "Add.", "solutions": list(solutions), "tests": TESTS} | changes)


def labels(sandbox, problem, **asked):
    [(labelled, said)] = label([problem], Labelling(limits=QUICK, **asked), sandbox)
    return [solution.correct for solution in labelled.solutions], said


def test_what_is_not_known_is_found_out_by_running_it(sandbox):
    unknown = [Solution(code=code) for code in (RIGHT, WRONG, SLOW, STRANGE)]
    found, said = labels(sandbox, problem(*unknown))
    assert found == [True, False, None, None]
    assert said == Counter(problems=1, passed=1, failed=1, timeout=1, error=1)


def test_known_labels_are_checked_only_when_asked(sandbox, caplog):
    published = [
        Solution(code=WRONG, correct=True),
        Solution(code=RIGHT, correct=False),
        Solution(code=RIGHT, correct=True),
    ]
    assert labels(sandbox, problem(*published)) == ([True, False, True], Counter(problems=1))
    found, said = labels(sandbox, problem(*published), check="all")
    assert (found, said["contradicted"]) == ([False, True, True], 2)
    assert "problem p, published as correct: failed (AssertionError" in caplog.text


def test_what_cannot_be_run_keeps_its_label(sandbox):
    cpp = Solution(code="int main(){}", correct=True, language="cpp")
    assert labels(sandbox, problem(cpp, Solution(code=STRANGE, correct=True)), check="all")[0] == [True, True]
    assert labels(sandbox, problem(Solution(code=RIGHT), tests=[]))[0] == [None]


def test_programs_that_print_and_answers_of_math(sandbox):
    printing = problem(
        Solution(code="print(int(input()) * 2)"),
        Solution(code="print(4)"),
        tests=[],
        stdin_tests=[Exchange("2\n", "4\n"), Exchange("3\n", "6\n")],
    )
    assert labels(sandbox, printing)[0] == [True, False]
    math = problem(
        Solution(code="2 + 2\n#### 1,004"), Solution(code="#### 5"), Solution(code="1004"), kind="math", answer="1004"
    )
    assert labels(sandbox, math)[0] == [True, False, False]


def test_wrong_solutions_are_made_of_a_right_one_and_fail(sandbox):
    asked = Labelling(mutations=3, seed=5, limits=QUICK)
    source = problem(Solution(code=WRONG, correct=True), Solution(code=RIGHT, correct=True))
    [(labelled, said)] = label([source], asked, sandbox)
    made = labelled.solutions[2:]
    assert [one.correct for one in made] == [False] * 3
    assert said["change failed"] >= 3
    assert all(one.code.startswith("def f(a, b):\n    return ") and one.code not in (RIGHT, WRONG) for one in made)
    again = labels(sandbox, labelled.model_copy(update={"solutions": [Solution(code=one.code) for one in made]}))
    assert again[0] == [False] * 3
    assert [labelled] == [one for one, _ in label([source], asked, sandbox)]


def test_a_problem_without_a_passing_solution_gets_no_wrong_ones(sandbox):
    found, said = labels(sandbox, problem(Solution(code=WRONG, correct=True)), mutations=3)
    assert (found, said["without a passing solution"]) == ([True], 1)


def test_the_sandbox_agrees_with_the_sample(sandbox):
    """What `test_sample` proves in one process of its own."""
    for labelled, _ in label(read_split(SAMPLE, "validation"), Labelling(check="all", limits=QUICK), sandbox):
        known = [solution.correct for solution in labelled.solutions]
        assert known == [True] + [False] * (len(known) - 1), labelled.id


# --- on the disk


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for split, count in (("train", 9), ("test", 2)):
        both = Solution(code=RIGHT), Solution(code=WRONG)
        problems = [problem(*both, id=str(number), difficulty=number or None) for number in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(dump(one) + "\n" for one in problems))
    return folder


def test_a_labelled_data_set_says_what_it_was_made_of(sandbox, source, tmp_path):
    asked = Labelling(limits=QUICK, seed=3)
    report = write_labelled(Work(source, tmp_path / "labelled", asked), sandbox)
    folder = tmp_path / "labelled"
    assert sorted(path.name for path in folder.iterdir()) == ["label.json", "test.jsonl", "train.jsonl"]
    assert json.loads((folder / "label.json").read_text()) == report
    assert report["sources"]["train.jsonl"] == hashlib.sha256((source / "train.jsonl").read_bytes()).hexdigest()
    assert report["files"]["test.jsonl"] == hashlib.sha256((folder / "test.jsonl").read_bytes()).hexdigest()
    assert (report["asked"]["seed"], report["said"]["passed"]) == (3, 11)
    for split, count in (("train", 9), ("test", 2)):
        problems = list(read_split(folder, split))
        assert [one.id for one in problems] == [str(number) for number in range(count)]
        assert [one.difficulty for one in problems] == [None, *range(1, count)]
        assert {tuple(solution.correct for solution in one.solutions) for one in problems} == {(True, False)}


def test_an_interrupted_call_goes_on_where_it_was(source, tmp_path):
    asked, folder = Labelling(limits=QUICK), tmp_path / "labelled"
    done = []

    def poll():
        if len(done) >= 3:
            raise Interrupted("stopped")

    with Sandbox(1) as sandbox, pytest.raises(Interrupted):
        write_labelled(
            Work(source, folder, asked, poll=poll, progress=lambda split, count: done.append(count)), sandbox
        )
    with (folder / ".partial-train.jsonl").open("a") as file:
        file.write('{"id": "half a li')
    counted = []
    with Sandbox(1) as sandbox:
        work = Work(source, folder, asked, progress=lambda split, count: counted.append((split, count)))
        report = write_labelled(work, sandbox)
    assert counted[0][1] > 3
    assert counted[-1] == ("test", 2)
    assert report["said"]["problems"] < 11
    assert [one.id for one in read_file(folder / "train.jsonl")] == [str(number) for number in range(9)]


@pytest.mark.parametrize("change", ["options", "data", "something else"])
def test_a_folder_of_something_else_is_left_alone(sandbox, source, tmp_path, change):
    folder = tmp_path / "labelled"
    write_labelled(Work(source, folder, Labelling(limits=QUICK)), sandbox)
    os.rename(folder / "label.json", folder / ".partial-label.json")  # as it is before the end
    (folder / ".partial-label.json").write_text(
        json.dumps(
            {
                key: value
                for key, value in json.loads((folder / ".partial-label.json").read_text()).items()
                if key not in ("said", "files")
            }
        )
    )
    asked = Labelling(limits=QUICK, seed=1 if change == "options" else 0)
    if change == "data":
        (source / "test.jsonl").write_text(dump(problem(Solution(code=RIGHT))))
    if change == "something else":
        (folder / ".partial-label.json").unlink()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(InputError, match="not empty"):
        write_labelled(Work(source, folder, asked), sandbox)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_call_that_came_to_nothing_is_in_nobodys_way(sandbox, source, tmp_path):
    train = source / "train.jsonl"
    right, folder = train.read_bytes(), tmp_path / "labelled"
    train.rename(source / "validation.jsonl")
    train.write_text("{\n")
    with pytest.raises(InputError, match="malformed"):
        write_labelled(Work(source, folder, Labelling(limits=QUICK)), sandbox)
    assert list(folder.iterdir())
    train.write_bytes(right)
    write_labelled(Work(source, folder, Labelling(limits=QUICK)), sandbox)
    assert len(list(read_file(folder / "train.jsonl"))) == 9


def test_the_splits_that_one_file_has(sandbox, tmp_path):
    source, record = tmp_path / "some.jsonl", {"text": "?", "code": RIGHT, "test_list": []}
    source.write_text(json.dumps(record | {"task_id": 1}))
    with pytest.raises(InputError, match="no problem of the train split"):
        write_labelled(Work(source, tmp_path / "labelled", Labelling(limits=QUICK)), sandbox)
    assert not (tmp_path / "labelled").exists()
    source.write_text("".join(json.dumps(record | {"task_id": number}) + "\n" for number in (11, 601)))
    report = write_labelled(Work(source, tmp_path / "labelled", Labelling(limits=QUICK)), sandbox)
    assert list(report["files"]) == ["train.jsonl", "test.jsonl"]
    assert list(summarise(source)["splits"]) == ["train", "test"]


def test_two_at_once_are_refused(sandbox, source, tmp_path):
    folder, refused = tmp_path / "labelled", []

    def second(split, count):
        if not refused:
            with pytest.raises(InputError, match="another process") as caught:
                write_labelled(Work(source, folder, Labelling(limits=QUICK)), sandbox)
            refused.append(caught.value)

    write_labelled(Work(source, folder, Labelling(limits=QUICK), progress=second), sandbox)
    assert len(refused) == 1
    assert len(list(read_file(folder / "train.jsonl"))) == 9
