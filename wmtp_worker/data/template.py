"""The Alpaca prompt (Stanford Alpaca, https://github.com/tatsu-lab/stanford_alpaca), as used for MBPP.

The tests stand in the input section: without them nobody could know the name that the function is called by.
"""

from wmtp_worker.data.mbpp import Problem

_PROMPT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def prompt(problem: Problem) -> str:
    """What the model is shown; its loss is not trained on."""
    return _PROMPT.format(instruction=problem.text.strip(), input="\n".join(problem.test_list))


def response(problem: Problem) -> str:
    """What the model learns to write."""
    return problem.code
