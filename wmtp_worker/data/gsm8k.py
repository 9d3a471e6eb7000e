"""GSM8K's own JSONL format (https://github.com/openai/grade-school-math): a question, and a solution that ends in its
answer after `####`.

There is no public validation split: see `formats.held_out`.
"""

from pydantic import field_validator

from wmtp_worker.data.problems import Problem, Record, Solution, SomeText

_MARK = "####"


class Gsm8kRow(Record):
    question: SomeText
    answer: SomeText

    @field_validator("answer")
    @classmethod
    def _has_an_answer(cls, text: str) -> str:
        if not final_answer(text):
            raise ValueError(f"has no final answer after {_MARK}")
        return text

    def problem(self, number: int) -> Problem:
        return Problem(
            id=f"gsm8k/{number}",
            statement=self.question,
            kind="math",
            solutions=[Solution(code=self.answer, correct=True)],
            answer=final_answer(self.answer),
        )


def final_answer(text: str) -> str | None:
    """What stands after the last `####`, without separators of thousands; None where nothing does."""
    _, mark, answer = text.rpartition(_MARK)
    return answer.strip().replace(",", "") or None if mark else None
