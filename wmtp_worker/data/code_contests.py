"""Code Contests as published on the hub (https://huggingface.co/datasets/deepmind/code_contests), a row a problem.

Enumerations are numbers there: difficulty 0 unknown, 1-6 easy to external, 7-28 the letters A-V of Codeforces;
languages as in `_LANGUAGES`.
"""

from typing import Self

from pydantic import Field, model_validator

from wmtp_worker.data.problems import Language, Problem, Record, Solution, SomeText, line_feeds
from wmtp_worker.host.sandbox import Exchange

_LANGUAGES: tuple[Language, ...] = ("unknown", "python2", "cpp", "python", "java")


class _Tests(Record):
    input: list[str] = Field(default_factory=list)
    output: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _in_pairs(self) -> Self:
        if len(self.input) != len(self.output):
            raise ValueError(f"{len(self.input)} inputs and {len(self.output)} outputs")
        return self

    def exchanges(self) -> list[Exchange]:
        return [Exchange(*pair) for pair in zip(self.input, self.output, strict=True)]


class _Solutions(Record):
    language: list[int] = Field(default_factory=list)
    solution: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _in_pairs(self) -> Self:
        if len(self.language) != len(self.solution):
            raise ValueError(f"{len(self.language)} languages and {len(self.solution)} solutions")
        return self

    def labelled(self, correct: bool) -> list[Solution]:
        return [
            Solution(code=code, correct=correct, language=_language(number))
            for number, code in zip(self.language, self.solution, strict=True)
            if code.strip()
        ]


class _Time(Record):
    seconds: int = 0
    nanos: int = 0

    def total(self) -> float | None:
        return self.seconds + self.nanos / 1e9 or None


class CodeContestsRow(Record):
    name: str = Field(min_length=1)
    description: SomeText
    public_tests: _Tests = _Tests()
    private_tests: _Tests = _Tests()
    generated_tests: _Tests = _Tests()
    difficulty: int = 0
    solutions: _Solutions
    incorrect_solutions: _Solutions = _Solutions()
    time_limit: _Time | None = None
    input_file: str | None = ""
    output_file: str | None = ""

    def problem(self, number: int) -> Problem:
        tests = [*self.public_tests.exchanges(), *self.private_tests.exchanges(), *self.generated_tests.exchanges()]
        return Problem(
            id=self.name,
            statement=line_feeds(self.description),
            difficulty=self.difficulty or None,
            # programs that must read and write named files are not run
            stdin_tests=[] if self.input_file or self.output_file else tests,
            seconds=None if self.time_limit is None else self.time_limit.total(),
            solutions=[*self.solutions.labelled(True), *self.incorrect_solutions.labelled(False)],
        )


def _language(number: int) -> Language:
    return _LANGUAGES[number] if 0 <= number < len(_LANGUAGES) else "unknown"
