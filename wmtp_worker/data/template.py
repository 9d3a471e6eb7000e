"""The Alpaca prompt (Stanford Alpaca, https://github.com/tatsu-lab/stanford_alpaca), with and without an input.

For MBPP the tests stand in the input section: without them nobody could know the name that the function is called by.
"""

from wmtp_worker.data.problems import Problem

_WITH_CONTEXT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_ALONE = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def prompt(problem: Problem) -> str:
    """What the model is shown; its loss is not trained on."""
    instruction = problem.statement.strip()
    if problem.context is None:
        return _ALONE.format(instruction=instruction)
    return _WITH_CONTEXT.format(instruction=instruction, input=problem.context)
