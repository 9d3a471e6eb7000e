"""What every data set becomes: problems with their tests, and solutions of which some are known to be right or wrong.

As JSON, one `Problem` a line, this is a format of its own: what `wmtp data label` writes.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from wmtp_worker.host.sandbox import Exchange, Job

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
Language = Literal["python", "python2", "cpp", "java", "unknown"]


def line_feeds(text: str) -> str:
    # MBPP's own code ends in CRLF lines, and in a lone CR where the last one was cut
    return text.replace("\r\n", "\n").replace("\r", "\n")


Text = Annotated[str, AfterValidator(line_feeds)]
SomeText = Annotated[str, Field(min_length=1), AfterValidator(line_feeds)]


class Record(BaseModel):
    """One line or row of a file, read strictly; keys that nobody asks for are left aside."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


class Solution(Record):
    """`correct` is None where nobody said it: to be found out by execution."""

    code: SomeText
    correct: bool | None = None
    language: Language = "python"


class Problem(Record):
    """One problem of any data set.

    `context` stands beside the statement in the prompt (MBPP: the tests, which name the function); None: nothing does.
    `tests` are statements that raise for a wrong program, run after `setup`; `stdin_tests` are what it reads and must
    print, in `seconds` each. `answer` is that of a math problem, whose solutions are texts.
    """

    id: str = Field(min_length=1)
    statement: SomeText
    solutions: list[Solution] = []
    kind: Literal["code", "math"] = "code"
    context: Text | None = None
    difficulty: int | None = None
    setup: Text = ""
    tests: list[Text] = []
    stdin_tests: list[Exchange] = []
    seconds: float | None = None
    answer: str | None = None

    def job(self, code: str) -> Job | None:
        """How to find out whether a Python program solves it; None where there are no tests."""
        if self.stdin_tests:
            return Job(code, exchanges=tuple(self.stdin_tests))
        return Job(code, tuple(self.tests), self.setup) if self.tests else None


def dump(problem: Problem) -> str:
    """One line of the format of our own, without its end."""
    return problem.model_dump_json(exclude_defaults=True)


def expected_keys(kind: type[Record]) -> str:
    """For an error: what a line of this kind must have."""
    needed: list[Any] = [name for name, field in kind.model_fields.items() if field.is_required()]
    return "a line is a JSON object with " + ", ".join(needed)
