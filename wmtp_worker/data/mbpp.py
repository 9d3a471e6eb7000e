"""MBPP's own JSONL format (https://github.com/google-research/google-research/tree/master/mbpp).

The single `mbpp.jsonl` is split by `task_id`, as published: 1-10 prompt, 11-510 test, 511-600 validation, 601-974
train. The sanitized part calls the text `prompt` and has `test_imports`.
"""

from pydantic import AliasChoices, Field

from wmtp_worker.data.problems import Problem, Record, Solution, SomeText, Split, Text

PUBLIC_SPLIT: dict[Split, range] = {
    "test": range(11, 511),
    "validation": range(511, 601),
    "train": range(601, 975),
}


class MbppRow(Record):
    """One line. `incorrect_code` is this project's own addition: plausible wrong solutions."""

    task_id: int
    text: SomeText = Field(validation_alias=AliasChoices("text", "prompt"))
    code: SomeText
    test_list: list[Text] = Field(default_factory=list)
    test_setup_code: Text = ""
    test_imports: list[Text] = Field(default_factory=list)
    incorrect_code: list[SomeText] = Field(default_factory=list)

    def problem(self, number: int) -> Problem:
        return Problem(
            id=str(self.task_id),
            statement=self.text,
            # without the tests nobody could know the name that the function is called by
            context="\n".join(self.test_list),
            setup="\n".join([*self.test_imports, self.test_setup_code]).strip("\n"),
            tests=self.test_list,  # as in the public evaluation, without the challenge tests
            solutions=[
                Solution(code=self.code, correct=True),
                *(Solution(code=code, correct=False) for code in self.incorrect_code),
            ],
        )
