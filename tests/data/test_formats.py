"""Public data sets as they really are, and a clear word about every way in which a file can be wrong."""

import gzip
import json
import os
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wmtp_worker.data.formats import FORMATS, files_of, find_part, format_of, read_file, read_split
from wmtp_worker.data.mbpp import PUBLIC_SPLIT, MbppRow
from wmtp_worker.data.problems import SPLITS, Problem, Solution, dump
from wmtp_worker.data.summary import summarise
from wmtp_worker.errors import InputError
from wmtp_worker.host.sandbox import Exchange

PUBLIC_COUNTS = {"train": 374, "validation": 90, "test": 500}


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
        read(path)
    return caught.value


def read(path: Path) -> list[Problem]:
    return list(read_file(path, "mbpp"))


def ids(folder: Path, split: str) -> list[str]:
    return [problem.id for problem in read_split(folder, split)]


@pytest.fixture
def real_data() -> Path:
    folder = os.environ.get("WMTP_TEST_DATA")
    if not folder:
        pytest.skip("WMTP_TEST_DATA is not set, so MBPP and HumanEval are not there")
    return Path(folder)


# --- what a problem is read as


def test_every_field_of_mbpp_is_kept(tmp_path):
    path = write(
        tmp_path / "p.jsonl",
        line(
            7, test_setup_code="import math", challenge_test_list=["assert add(9, 9) == 18"], incorrect_code=["x", "y"]
        ),
    )
    tests = ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]
    assert read(path) == [
        Problem(
            id="7",
            statement="Write a function to add two numbers.",
            context="\n".join(tests),
            tests=tests,
            setup="import math",
            solutions=[
                Solution(code="def add(a, b):\n    return a + b", correct=True),
                Solution(code="x", correct=False),
                Solution(code="y", correct=False),
            ],
        )
    ]


def test_the_sanitized_part_of_mbpp_reads_too(tmp_path):
    row = {
        "source_file": "f",
        "task_id": 2,
        "prompt": "t",
        "code": "c",
        "test_imports": ["import math"],
        "test_list": ["a"],
    }
    [problem] = read_file(write(tmp_path / "p.jsonl", json.dumps(row).encode()))
    assert (problem.statement, problem.setup, problem.tests) == ("t", "import math", ["a"])


def test_only_three_keys_are_needed_and_unknown_ones_are_left_aside(tmp_path):
    [problem] = read(
        write(tmp_path / "p.jsonl", b'{"task_id": 1, "text": "t", "code": "c", "source_file": "elsewhere"}\n')
    )
    assert (problem.tests, problem.setup, len(problem.solutions)) == ([], "", 1)


@given(st.lists(st.sampled_from(["\r\n", "\r", "\n", "x", " ", "한"]), min_size=1).map("".join))
def test_line_ends_become_line_feeds_in_every_text(text):
    fields = {"text": text, "code": text, "test_setup_code": text}
    lists = {key: [text] for key in ("test_list", "incorrect_code")}
    problem = MbppRow(task_id=1, **fields, **lists)
    expected = "\n".join(part for whole in text.split("\r\n") for part in whole.split("\r"))
    assert all(getattr(problem, key) == expected for key in fields)
    assert all(getattr(problem, key) == [expected] for key in lists)


def test_backslash_r_inside_code_is_no_line_end(tmp_path):
    code = 'print("a\\r\\nb")'
    [problem] = read(write(tmp_path / "p.jsonl", line(code=code)))
    assert problem.solutions[0].code == code


def test_unicode_line_separators_do_not_split_a_line(tmp_path):
    text = "a\u2028b\u0085c\x0bd"
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"task_id": 1, "text": text, "code": "c"}, ensure_ascii=False), encoding="utf-8")
    assert [problem.statement for problem in read(path)] == [text]


def test_files_from_windows_read_the_same(tmp_path):
    """A byte order mark in front and CRLF between the objects: what Windows editors save."""
    plain = write(tmp_path / "plain.jsonl", line(1), line(2))
    windows = write(
        tmp_path / "windows.jsonl", b"\xef\xbb\xbf", *(one.replace(b"\n", b"\r\n") for one in (line(1), line(2)))
    )
    assert read(windows) == read(plain)


def test_last_line_needs_no_line_feed(tmp_path):
    assert len(read(write(tmp_path / "p.jsonl", line(1), line(2).removesuffix(b"\n")))) == 2


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
    split = {name: ids(tmp_path, name) for name in SPLITS}
    assert split == {"train": ["974", "601"], "validation": ["600", "511"], "test": ["510", "11"]}


def test_public_split_has_the_published_sizes():
    assert {name: len(numbers) for name, numbers in PUBLIC_SPLIT.items()} == PUBLIC_COUNTS


@pytest.mark.parametrize("name", ["mbpp.jsonl", "any-name.jsonl"])
def test_single_file_may_be_given_itself(tmp_path, name):
    path = write(tmp_path / name, line(600), line(601))
    assert files_of(path, ("train", "validation")) == [path]
    assert (ids(path, "train"), ids(path, "validation")) == (["601"], ["600"])


def test_split_without_problems_says_which_numbers_it_wants(tmp_path):
    path = write(tmp_path / "mbpp.jsonl", line(601))
    with pytest.raises(InputError, match="validation split") as caught:
        list(read_split(tmp_path, "validation"))
    assert "511-600" in caught.value.what
    assert caught.value.where == str(path)


def test_folder_layout_takes_files_as_they_are(tmp_path):
    """In a folder of split files the file decides: numbers of another public split stay in."""
    write(tmp_path / "train.jsonl", line(3), line(1))
    write(tmp_path / "validation.jsonl", line(700))
    assert (ids(tmp_path, "train"), ids(tmp_path, "validation")) == (["3", "1"], ["700"])
    assert files_of(tmp_path, ("train", "validation")) == [tmp_path / "train.jsonl", tmp_path / "validation.jsonl"]


def test_a_folder_may_hold_a_split(tmp_path):
    """Whatever its files are called, and only where no file is named after a split outside of such folders."""
    for name in ("train/b.jsonl", "train/train.jsonl", "train/._b.jsonl", "valid/test.jsonl", "other/x.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, line(len(name)))
    assert ids(tmp_path, "train") == [str(len("train/b.jsonl")), str(len("train/train.jsonl"))]
    assert ids(tmp_path, "validation") == [str(len("valid/test.jsonl"))]
    assert find_part(tmp_path, "test") is None
    assert list(summarise(tmp_path)["files"]) == ["train/b.jsonl", "train/train.jsonl", "valid/test.jsonl"]
    write(tmp_path / "other" / "test.jsonl", line(7))
    assert [ids(tmp_path, "test"), find_part(tmp_path, "train")] == [["7"], None]
    write(tmp_path / "train.jsonl", line(8))
    assert [ids(tmp_path, "train"), find_part(tmp_path, "validation")] == [["8"], None]


def test_files_of_one_name_in_several_folders(tmp_path):
    for number, name in enumerate(SPLITS):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "data.jsonl", line(number))
    assert [ids(tmp_path, name) for name in SPLITS] == [["0"], ["1"], ["2"]]
    assert len(summarise(tmp_path)["files"]) == 3


@pytest.mark.parametrize("there", ["train", "validation"])
def test_missing_file_is_named_with_its_folder(tmp_path, there):
    write(tmp_path / f"{there}.jsonl", line())
    missing = {"train": "validation", "validation": "train"}[there]
    with pytest.raises(InputError, match=rf"no {missing}\.jsonl and no mbpp\.jsonl") as caught:
        files_of(tmp_path, ("train", "validation"))
    assert str(tmp_path) in caught.value.where


def test_real_mbpp_has_its_public_splits(real_data):
    splits = {name: ids(real_data / "mbpp", name) for name in SPLITS}
    assert {name: len(problems) for name, problems in splits.items()} == PUBLIC_COUNTS
    assert sorted(int(number) for numbers in splits.values() for number in numbers) == list(range(11, 975))


def test_real_mbpp_loses_its_carriage_returns(real_data):
    path = real_data / "mbpp" / "mbpp.jsonl"
    assert rb"\r\n" in path.read_bytes()
    for problem in read_file(path):
        assert "\r" not in problem.model_dump_json()
        assert len(problem.tests) == 3


# --- the other formats


def test_real_humaneval_is_a_test_split(real_data):
    folder = real_data / "humaneval"
    problems = list(read_split(folder, "test"))
    assert len(problems) == 164
    assert problems[0].id == "HumanEval/0"
    assert problems[0].solutions[0].code.startswith(problems[0].statement)
    assert problems[0].tests[0].endswith("check(has_close_elements)\n")
    assert find_part(folder, "train") is None
    with pytest.raises(InputError, match="no problem of the train split"):
        read_split(folder, "train")


CODE_CONTESTS = {
    "name": "1575_A. Another Sorting Problem",
    "description": "Sort.\r\n\nInput\n\nn",
    "public_tests": {"input": ["2\n"], "output": ["4\n"]},
    "private_tests": {"input": [], "output": []},
    "generated_tests": {"input": ["3\n"], "output": ["6\n"]},
    "source": 2,
    "difficulty": 7,
    "solutions": {"language": [2, 3, 1], "solution": ["int main(){}", "print(int(input())*2)", "print input()*2"]},
    "incorrect_solutions": {"language": [3, 4, 0], "solution": ["print(4)", "class A {}", "?"]},
    "cf_contest_id": 1575,
    "cf_index": "A",
    "cf_points": 0.0,
    "cf_rating": 1100,
    "cf_tags": ["sortings"],
    "is_description_translated": False,
    "untranslated_description": "",
    "time_limit": {"seconds": 2, "nanos": 500000000},
    "memory_limit_bytes": 512000000,
    "input_file": "",
    "output_file": "",
}


def contest(**changes: object) -> bytes:
    return json.dumps(CODE_CONTESTS | changes).encode() + b"\n"


def test_code_contests_as_the_hub_has_it(tmp_path):
    write(tmp_path / "train-00000-of-00002.jsonl", contest(name="a", time_limit=None, difficulty=0))
    write(tmp_path / "train-00001-of-00002.jsonl", contest())
    write(tmp_path / "valid.jsonl", contest(name="v", input_file="in.txt"))
    first, second = read_split(tmp_path, "train")
    assert (first.id, first.seconds, first.difficulty) == ("a", None, None)
    assert second == Problem(
        id="1575_A. Another Sorting Problem",
        statement="Sort.\n\nInput\n\nn",
        difficulty=7,
        seconds=2.5,
        stdin_tests=[Exchange("2\n", "4\n"), Exchange("3\n", "6\n")],
        solutions=[
            Solution(code="int main(){}", correct=True, language="cpp"),
            Solution(code="print(int(input())*2)", correct=True),
            Solution(code="print input()*2", correct=True, language="python2"),
            Solution(code="print(4)", correct=False),
            Solution(code="class A {}", correct=False, language="java"),
            Solution(code="?", correct=False, language="unknown"),
        ],
    )
    [validation] = read_split(tmp_path, "validation")
    assert (validation.id, validation.stdin_tests) == ("v", [])  # it reads a file, which is not there


def gsm8k(question: str = "How many?", answer: str = "2 + 2 = <<2+2=4>>4\n#### 1,004") -> bytes:
    return json.dumps({"question": question, "answer": answer}).encode() + b"\n"


def test_gsm8k_holds_out_what_it_has_not(tmp_path):
    write(tmp_path / "train.jsonl", *(gsm8k(f"question {number}") for number in range(400)))
    write(tmp_path / "test.jsonl", gsm8k())
    train, validation = ids(tmp_path, "train"), ids(tmp_path, "validation")
    assert sorted(train + validation, key=lambda name: int(name.removeprefix("gsm8k/"))) == [
        f"gsm8k/{number}" for number in range(1, 401)
    ]
    assert 5 <= len(validation) <= 40
    [problem] = read_split(tmp_path, "test")
    assert (problem.kind, problem.answer, problem.tests) == ("math", "1004", [])
    assert problem.solutions[0].code.endswith("#### 1,004")
    write(tmp_path / "validation.jsonl", gsm8k())  # whoever has made one gets that, and all of the training problems
    assert (len(ids(tmp_path, "train")), len(ids(tmp_path, "validation"))) == (400, 1)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (gsm8k(answer="4"), "answer: Value error, has no final answer after ####"),
        (gsm8k(answer="4 ####  "), "has no final answer"),
        (contest(public_tests={"input": ["1"], "output": []}), "public_tests: Value error, 1 inputs and 0 outputs"),
        (contest(solutions={"language": [3], "solution": []}), "solutions: Value error, 1 languages and 0 solutions"),
        (contest(difficulty="A"), "difficulty: Input should be a valid integer"),
        (contest(description=None), "description: Input should be a valid string"),
        (b'{"id": "1", "statement": "s", "solutions": [{"code": "c", "correct": 1}]}', "solutions.0.correct: Input"),
        (
            b'{"task_id": "HumanEval/0", "prompt": "p", "canonical_solution": "c", "entry_point": 1}',
            "entry_point: Input",
        ),
        (b'{"text": "plain text"}', "not in a known format: its keys are text"),
        (b"{}", "its keys are none"),
        (b"[1]", "malformed problem: not an object"),
        (b"{", "Invalid JSON"),
        (b"[" * 100_000, "Invalid JSON"),
    ],
)
def test_each_format_is_read_strictly(tmp_path, content, words):
    path = write(tmp_path / "train.jsonl", content)
    with pytest.raises(InputError) as caught:
        list(read_split(tmp_path, "train"))
    assert words in caught.value.what
    assert caught.value.where == f"{path}, line 1"


PROBLEM = Problem(
    id="1",
    statement="s",
    context="",
    tests=["assert f()"],
    setup="import math",
    difficulty=3,
    solutions=[Solution(code="c", correct=True), Solution(code="d", correct=False), Solution(code="e")],
)
MATH = Problem(id="2", statement="s", kind="math", answer="4", solutions=[Solution(code="#### 4", correct=True)])
CONTEST = Problem(id="3", statement="s", stdin_tests=[Exchange("1\r\n", "2")], seconds=1.5)


def test_labelled_problems_read_as_they_were_written(tmp_path):
    problems = [PROBLEM, MATH, CONTEST]
    path = write(tmp_path / "train.jsonl", *(dump(problem).encode() + b"\n" for problem in problems))
    assert [problem.model_dump() for problem in read_file(path)] == [problem.model_dump() for problem in problems]


def test_the_format_is_found_out_or_told(tmp_path):
    contents = {
        "mbpp": line(),
        "code_contests": contest(),
        "humaneval": b'{"task_id": "1", "prompt": "p", "entry_point": "f", "canonical_solution": "c", "test": "t"}',
        "gsm8k": gsm8k(),
        "labelled": dump(PROBLEM).encode(),
    }
    assert set(contents) == set(FORMATS)
    paths = {name: write(tmp_path / f"{name}.jsonl", content) for name, content in contents.items()}
    assert {name: format_of(path) for name, path in paths.items()} == {name: name for name in FORMATS}
    with pytest.raises(InputError, match="question: Field required"):
        list(read_file(paths["mbpp"], "gsm8k"))


# --- files


def test_compressed_lines_read_the_same(tmp_path):
    path = tmp_path / "train.jsonl.gz"
    path.write_bytes(gzip.compress(line(1) + line(2)))
    assert ids(tmp_path, "train") == ["1", "2"]


@pytest.mark.parametrize("cut", [5, -5], ids=["head", "tail"])
def test_a_damaged_file_is_said_to_be_damaged(tmp_path, cut):
    path = tmp_path / "train.jsonl.gz"
    path.write_bytes(gzip.compress(line(1) * 100)[:cut])
    with pytest.raises(InputError, match="damaged") as caught:
        list(read_split(tmp_path, "train"))
    assert caught.value.where == str(path)
    path.write_bytes(b"no gzip at all")
    with pytest.raises(InputError, match="damaged"):
        list(read_split(tmp_path, "train"))


def test_parquet_reads_as_lines_do(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [CODE_CONTESTS | {"name": str(number)} for number in range(40)]
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "valid-00000-of-00001-e9c1f5ec7e6bd1a3.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=16)
    lines = write(tmp_path / "lines.jsonl", *(json.dumps(row).encode() + b"\n" for row in rows))
    assert list(read_split(tmp_path, "validation")) == list(read_file(lines))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="damaged") as caught:
        list(read_split(tmp_path, "validation"))
    assert caught.value.where == str(path)


def test_zstandard_reads_as_lines_do(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    with pyarrow.CompressedOutputStream(str(tmp_path / "train.jsonl.zst"), "zstd") as file:
        file.write(line(1) + line(2))
    assert ids(tmp_path, "train") == ["1", "2"]


def test_without_pyarrow_it_is_said_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "train.jsonl.zst").touch()
    with pytest.raises(InputError, match="not installed") as caught:
        list(read_split(tmp_path, "train"))
    assert "-m pip install pyarrow" in caught.value.fix


def test_the_only_file_of_a_folder_counts_whatever_its_name(tmp_path):
    write(tmp_path / "contests.jsonl", contest())
    (tmp_path / "README.md").touch()
    assert len(ids(tmp_path, "test")) == 1
    write(tmp_path / "more.jsonl", contest())
    with pytest.raises(InputError, match=r"no test\.jsonl"):
        read_split(tmp_path, "test")


def test_memory_stays_flat_however_large_the_file(tmp_path):
    path = tmp_path / "train.jsonl.gz"
    row = contest(generated_tests={"input": ["1 " * 50_000], "output": ["2"]})
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(400):
            file.write(row)
    assert 400 * len(row) > 40e6
    tracemalloc.start()
    try:
        count = sum(1 for _ in read_split(tmp_path, "train"))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 400
    assert most < 5e6


def test_a_line_that_no_memory_holds_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("wmtp_worker.data.files._LONGEST", 1 << 20)
    path = tmp_path / "train.jsonl.gz"
    path.write_bytes(gzip.compress(line(1) + b" " * (1 << 24)))
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="a line of 1 MB or more") as caught:
            list(read_split(tmp_path, "train"))
        assert tracemalloc.get_traced_memory()[1] < 1e7
    finally:
        tracemalloc.stop()
    assert caught.value.where == f"{path}, line 2"
