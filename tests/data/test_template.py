"""The prompt, letter by letter."""

from wmtp_worker.data.problems import Problem, Solution
from wmtp_worker.data.template import prompt

PROBLEM = Problem(
    id="1",
    statement="  Write a function to add {a} and {b}.\n",
    context="assert add(1, 2) == 3\nassert add({}, {0}) == '{x}'",
    solutions=[Solution(code="SECRET", correct=True)],
    tests=["SECRET"],
    setup="SECRET",
    answer="SECRET",
)


def test_prompt_is_alpacas_with_the_context_as_input():
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


def test_without_a_context_it_is_alpacas_other_prompt():
    assert prompt(PROBLEM.model_copy(update={"context": None})) == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n"
        "\n"
        "### Instruction:\n"
        "Write a function to add {a} and {b}.\n"
        "\n"
        "### Response:\n"
    )


def test_prompt_gives_nothing_away():
    assert "SECRET" not in prompt(PROBLEM)
