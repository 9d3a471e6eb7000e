"""HumanEval's own JSONL format (https://github.com/openai/human-eval): a function to complete, and `check(candidate)`.

It is for evaluation: all of it is the split "test".
"""

from wmtp_worker.data.problems import Problem, Record, Solution, SomeText, Text


class HumanEvalRow(Record):
    task_id: str
    prompt: SomeText
    canonical_solution: SomeText
    entry_point: SomeText
    test: Text

    def problem(self, number: int) -> Problem:
        return Problem(
            id=self.task_id,
            statement=self.prompt,
            tests=[f"{self.test}\n\ncheck({self.entry_point})\n"],
            solutions=[Solution(code=self.prompt + self.canonical_solution, correct=True)],
        )
