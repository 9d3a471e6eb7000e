"""Changes of programs: one place each, all different, all of them Python, and the rest letter by letter the same."""

import ast
import difflib
import json
from itertools import islice
from pathlib import Path

import pytest

import wmtp_worker
from wmtp_worker.data.mutate import mutants

SAMPLE = Path(wmtp_worker.__file__).parent / "data" / "sample" / "train.jsonl"
CODES = [json.loads(line)["code"] for line in SAMPLE.read_text(encoding="utf-8").splitlines()]


def changes(code: str, seed: int = 0) -> set[str]:
    """The lines that mutants have instead of the original's."""
    before = code.split("\n")
    found = set()
    for changed in mutants(code, seed):
        lines = difflib.ndiff(before, changed.split("\n"))
        found.add("|".join(line[2:].strip() for line in lines if line.startswith("+ ")))
    return found


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return a + b", {"return a - b", "return None", "return b + b", "return a + a"}),
        (
            "return a <= 2",
            {"return a < 2", "return a >= 2", "return a <= 3", "return a <= 1", "return None", "return b <= 2"},
        ),
        ("return range(a)", {"return range(a + 1)", "return range(a - 1)", "return None", "return range(b)"}),
        (
            "return a[1:b]",
            {
                "return a[1 + 1:b]",
                "return a[1:b + 1]",
                "return a[2:b]",
                "return a[0:b]",
                "return b[1:b]",
                "return a[1:a]",
                "return None",
            },
        ),
        ("return max(a, b)", {"return min(a, b)", "return max(b, b)", "return max(a, a)", "return None"}),
        ("if a:\n        return 1", {"if not (a):", "if b:", "return 2", "return 0"}),
        ("a.sort()\n    return a", {"", "b.sort()", "return b", "return None"}),
        (
            "'é' + a  # é < é\n    return 0 < b",
            {
                "",
                "'é' - a  # é < é",
                "'é' + b  # é < é",
                "return 1 < b",
                "return 0 <= b",
                "return 0 > b",
                "return 0 < a",
                "return None",
            },
        ),
        ("return f'{a + 1} {b}'", {"return None"}),
        ("'''Text: 1 + 1.'''", set()),
    ],
)
def test_which_changes_there_are(body, expected):
    assert changes(f"def f(a, b):\n    {body}") == expected


def test_a_function_named_as_a_builtin_keeps_its_name():
    assert changes("def sum(a):\n    return sum(a)") == {"return None"}


@pytest.mark.parametrize("number", range(0, len(CODES), 4))
def test_mutants_of_real_programs(number):
    code = CODES[number]
    made = list(mutants(code, 7))
    trees = {ast.dump(ast.parse(one)) for one in made}
    assert len(made) == len(trees) >= 2
    assert ast.dump(ast.parse(code)) not in trees
    assert made == list(mutants(code, 7))
    assert set(made) == set(mutants(code, 8))
    for one in made:
        assert one.endswith("\n") == code.endswith("\n")
        # one place only: what is before it and behind it is untouched
        same = difflib.SequenceMatcher(None, code.split("\n"), one.split("\n"), autojunk=False)
        assert len([tag for tag, *_ in same.get_opcodes() if tag != "equal"]) == 1


def test_the_first_ones_are_of_different_kinds():
    """However many names there are to exchange."""
    code = "def f(a, b, c, d):\n    return [a, b, c, d, a, b, c, d, a < 1]"
    for seed in range(5):
        firsts = list(islice(mutants(code, seed), 4))
        assert any("None" in one for one in firsts)
        assert any("a <=" in one or "a >" in one for one in firsts)
        assert any("< 0" in one or "< 2" in one for one in firsts)


@pytest.mark.parametrize("code", ["print 'two'", "def f(:", "", "x = 'abc'", "\x00", "(" * 500])
def test_what_has_no_mutants(code):
    assert list(mutants(code, 0)) == []
