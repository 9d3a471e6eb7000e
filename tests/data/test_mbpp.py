"""MBPP's files as they really are, and a clear word about every way in which one can be wrong."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wmtp_worker.data.mbpp import PUBLIC_SPLIT, Problem, read_problems, read_split, split_files
from wmtp_worker.errors import InputError

PUBLIC_COUNTS = {"train": 374, "validation": 90, "test": 500}
SPLITS = tuple(PUBLIC_COUNTS)


def line(task_id: int = 601, **changes: object) -> bytes:
    """One line in the shape of MBPP's own, `changes` made; a value of None leaves the key out."""
    document = {
        "text": "Write a function to add two numbers.",
        "code": "def add(a, b):\r\n    return a + b",
        "task_id": task_id,
        "test_setup_code": "",
        "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"],
        "challenge_test_list": [],
    }
    merged = {key: value for key, value in (document | changes).items() if value is not None}
    return json.dumps(merged).encode() + b"\n"


def write(path: Path, *lines: bytes) -> Path:
    path.write_bytes(b"".join(lines))
    return path


def refusal(path: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        read_problems(path)
    return caught.value


@pytest.fixture
def real_mbpp() -> Path:
    folder = os.environ.get("WMTP_TEST_DATA")
    if not folder:
        pytest.skip("WMTP_TEST_DATA is not set, so MBPP is not there")
    return Path(folder) / "mbpp"


# --- what a problem is read as


def test_every_field_is_kept(tmp_path):
    path = write(
        tmp_path / "p.jsonl",
        line(
            7, test_setup_code="import math", challenge_test_list=["assert add(9, 9) == 18"], incorrect_code=["x", "y"]
        ),
    )
    assert read_problems(path) == [
        Problem(
            task_id=7,
            text="Write a function to add two numbers.",
            code="def add(a, b):\n    return a + b",
            test_list=["assert add(1, 2) == 3", "assert add(0, 0) == 0"],
            test_setup_code="import math",
            challenge_test_list=["assert add(9, 9) == 18"],
            incorrect_code=["x", "y"],
        )
    ]


def test_only_three_keys_are_needed_and_unknown_ones_are_left_aside(tmp_path):
    [problem] = read_problems(
        write(tmp_path / "p.jsonl", b'{"task_id": 1, "text": "t", "code": "c", "source_file": "elsewhere"}\n')
    )
    assert (problem.test_list, problem.test_setup_code, problem.challenge_test_list, problem.incorrect_code) == (
        [],
        "",
        [],
        [],
    )


@given(st.lists(st.sampled_from(["\r\n", "\r", "\n", "x", " ", "한"]), min_size=1).map("".join))
def test_line_ends_become_line_feeds_in_every_text(text):
    fields = {"text": text, "code": text, "test_setup_code": text}
    lists = {key: [text] for key in ("test_list", "challenge_test_list", "incorrect_code")}
    problem = Problem(task_id=1, **fields, **lists)
    expected = "\n".join(part for whole in text.split("\r\n") for part in whole.split("\r"))
    assert all(getattr(problem, key) == expected for key in fields)
    assert all(getattr(problem, key) == [expected] for key in lists)


def test_backslash_r_inside_code_is_no_line_end(tmp_path):
    code = 'print("a\\r\\nb")'
    [problem] = read_problems(write(tmp_path / "p.jsonl", line(code=code)))
    assert problem.code == code


def test_unicode_line_separators_do_not_split_a_line(tmp_path):
    text = "a\u2028b\u0085c\x0bd"
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"task_id": 1, "text": text, "code": "c"}, ensure_ascii=False), encoding="utf-8")
    assert [problem.text for problem in read_problems(path)] == [text]


def test_files_from_windows_read_the_same(tmp_path):
    """A byte order mark in front and CRLF between the objects: what Windows editors save."""
    plain = write(tmp_path / "plain.jsonl", line(1), line(2))
    windows = write(
        tmp_path / "windows.jsonl", b"\xef\xbb\xbf", *(one.replace(b"\n", b"\r\n") for one in (line(1), line(2)))
    )
    assert read_problems(windows) == read_problems(plain)


def test_last_line_needs_no_line_feed(tmp_path):
    assert len(read_problems(write(tmp_path / "p.jsonl", line(1), line(2).removesuffix(b"\n")))) == 2


# --- what is refused, and where it says the fault is


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        pytest.param(b"\n", "empty line", id="empty"),
        pytest.param(b"   \t\n", "empty line", id="blanks"),
        pytest.param(b'{"task_id": 1, \n', "Invalid JSON", id="cut"),
        pytest.param(b"[1, 2]\n", "object", id="no object"),
        pytest.param(line(code=None), "code: Field required", id="missing code"),
        pytest.param(line(text=None), "text: Field required", id="missing text"),
        pytest.param(line(task_id="601"), "task_id: Input should be a valid integer", id="number in quotes"),
        pytest.param(line(task_id=True), "task_id: Input should be a valid integer", id="true for a number"),
        pytest.param(line(code=5), "code: Input should be a valid string", id="number for text"),
        pytest.param(line(code=""), "code: String should have at least 1 character", id="empty code"),
        pytest.param(line(test_list="assert f()"), "test_list: Input should be a valid", id="text for a list"),
        pytest.param(line(test_list=["a", 1]), "test_list.1: Input should be a valid string", id="number in a list"),
        pytest.param(b'{"task_id": 1, "text": "caf\xe9", "code": "c"}\n', "not UTF-8", id="latin-1"),
        pytest.param(b"\xef\xbb\xbf" + line(), "malformed", id="byte order mark in the middle"),
    ],
)
def test_bad_line_is_named(tmp_path, bad, words):
    path = write(tmp_path / "train.jsonl", line(1), line(2), bad, line(4))
    error = refusal(path)
    assert words in error.what
    assert error.where == f"{path}, line 3"
    assert error.fix


def test_first_line_can_be_the_bad_one(tmp_path):
    path = write(tmp_path / "train.jsonl", b"\xff\xfe{\x00}\x00")  # UTF-16
    error = refusal(path)
    assert "not UTF-8" in error.what
    assert error.where == f"{path}, line 1"


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf"], ids=["nothing", "only a byte order mark"])
def test_empty_file_is_refused(tmp_path, content):
    path = write(tmp_path / "train.jsonl", content)
    error = refusal(path)
    assert "empty" in error.what
    assert str(path) in error.where


# --- splits


def test_public_split_goes_by_task_id_not_by_place(tmp_path):
    """Every boundary number, in falling order, so that neither position nor order can stand in for the number."""
    numbers = [975, 974, 601, 600, 511, 510, 11, 10, 1]
    write(tmp_path / "mbpp.jsonl", *(line(number) for number in numbers))
    split = {name: [problem.task_id for problem in read_split(tmp_path, name)] for name in SPLITS}
    assert split == {"train": [974, 601], "validation": [600, 511], "test": [510, 11]}


def test_public_split_has_the_published_sizes():
    assert {name: len(numbers) for name, numbers in PUBLIC_SPLIT.items()} == PUBLIC_COUNTS


@pytest.mark.parametrize("name", ["mbpp.jsonl", "any-name.jsonl"])
def test_single_file_may_be_given_itself(tmp_path, name):
    path = write(tmp_path / name, line(600), line(601))
    assert split_files(path, ("train", "validation")) == [path]
    assert [problem.task_id for problem in read_split(path, "train")] == [601]
    assert [problem.task_id for problem in read_split(path, "validation")] == [600]


def test_split_without_problems_says_which_numbers_it_wants(tmp_path):
    path = write(tmp_path / "mbpp.jsonl", line(601))
    with pytest.raises(InputError, match="validation split") as caught:
        read_split(tmp_path, "validation")
    assert "511-600" in caught.value.what
    assert caught.value.where == str(path)


def test_folder_layout_takes_files_as_they_are(tmp_path):
    """In a folder of split files the file decides: numbers of another public split stay in."""
    write(tmp_path / "train.jsonl", line(3), line(1))
    write(tmp_path / "validation.jsonl", line(700))
    assert [problem.task_id for problem in read_split(tmp_path, "train")] == [3, 1]
    assert [problem.task_id for problem in read_split(tmp_path, "validation")] == [700]
    assert split_files(tmp_path, ("train", "validation")) == [tmp_path / "train.jsonl", tmp_path / "validation.jsonl"]


@pytest.mark.parametrize("there", ["train", "validation"])
def test_missing_file_is_named_with_its_folder(tmp_path, there):
    write(tmp_path / f"{there}.jsonl", line())
    missing = {"train": "validation", "validation": "train"}[there]
    with pytest.raises(InputError, match=rf"no {missing}\.jsonl and no mbpp\.jsonl") as caught:
        split_files(tmp_path, ("train", "validation"))
    assert str(tmp_path) in caught.value.where


def test_real_mbpp_has_its_public_splits(real_mbpp):
    splits = {name: read_split(real_mbpp, name) for name in SPLITS}
    assert {name: len(problems) for name, problems in splits.items()} == PUBLIC_COUNTS
    numbers = [problem.task_id for problems in splits.values() for problem in problems]
    assert sorted(numbers) == list(range(11, 975))


def test_real_mbpp_loses_its_carriage_returns(real_mbpp):
    raw = (real_mbpp / "mbpp.jsonl").read_bytes()
    assert rb"\r\n" in raw
    for problem in read_problems(real_mbpp / "mbpp.jsonl"):
        assert "\r" not in "".join([problem.text, problem.code, *problem.test_list, problem.test_setup_code])
        assert len(problem.test_list) == 3
