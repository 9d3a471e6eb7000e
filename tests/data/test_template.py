"""The prompt, letter by letter."""

from wmtp_worker.data.mbpp import Problem
from wmtp_worker.data.template import prompt, response

PROBLEM = Problem(
    task_id=1,
    text="  Write a function to add {a} and {b}.\n",
    code="def add(a, b):\n    return a + b\n",
    test_list=["assert add(1, 2) == 3", "assert add({}, {0}) == '{x}'"],
    incorrect_code=["SECRET"],
    challenge_test_list=["SECRET"],
)


def test_prompt_is_alpacas_with_the_tests_as_input():
    assert prompt(PROBLEM) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n"
        "\n"
        "### Instruction:\n"
        "Write a function to add {a} and {b}.\n"
        "\n"
        "### Input:\n"
        "assert add(1, 2) == 3\n"
        "assert add({}, {0}) == '{x}'\n"
        "\n"
        "### Response:\n"
    )


def test_response_is_the_code_untouched():
    assert response(PROBLEM) == PROBLEM.code


def test_prompt_gives_nothing_away():
    assert PROBLEM.code not in prompt(PROBLEM)
    assert "SECRET" not in prompt(PROBLEM) + response(PROBLEM)
