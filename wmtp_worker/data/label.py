"""What execution says of solutions: labels where there are none, and wrong solutions made of right ones."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Literal

from wmtp_worker.data.gsm8k import final_answer
from wmtp_worker.data.mutate import mutants
from wmtp_worker.data.problems import Problem, Solution
from wmtp_worker.host.sandbox import Limits, Result, Sandbox

log = logging.getLogger(__name__)

Check = Literal["missing", "all"]
# so many changes are tried for each wrong solution that is wanted
_TRIES = 6


@dataclass(frozen=True)
class Labelling:
    """What is asked for: `check` "missing" runs solutions without a label only; `mutations` wrong ones per problem."""

    check: Check = "missing"
    mutations: int = 0
    seed: int = 0
    limits: Limits = field(default_factory=Limits)


def label(
    problems: Iterable[Problem], asked: Labelling, sandbox: Sandbox, poll: Callable[[], None] = lambda: None
) -> Iterator[tuple[Problem, Counter[str]]]:
    """The problems, in order, with what execution says of their solutions, and how often it said what.

    A solution's label is what its tests say; where they say nothing (it timed out, it needs what the sandbox has not,
    there are no tests, it is not in Python 3) it keeps the one it has. Wrong solutions are added behind the others:
    changes of the first correct solution that passes, each of which ran and failed; wrong answers before crashes.
    """
    return sandbox.map(lambda problem: _label_one(problem, asked, sandbox), problems, poll)


def _label_one(problem: Problem, asked: Labelling, sandbox: Sandbox) -> tuple[Problem, Counter[str]]:
    said: Counter[str] = Counter(problems=1)
    limits = asked.limits
    if problem.seconds is not None:  # of the contest's machine and language; Python is slower
        limits = replace(limits, cpu_seconds=max(limits.cpu_seconds, math.ceil(problem.seconds)))
    results: dict[str, Result] = {}

    def run(code: str, within: Limits = limits) -> Result | None:
        job = problem.job(code)
        return None if job is None else sandbox.run(job, within)

    solutions = []
    for solution in problem.solutions:
        if solution.language != "python" or (asked.check == "missing" and solution.correct is not None):
            solutions.append(solution)
        elif problem.kind == "math":
            solutions.append(_by_answer(problem, solution, said))
        elif (result := run(solution.code)) is None:
            solutions.append(solution)
        else:
            results[solution.code] = result
            solutions.append(_by_result(problem, solution, result, said))
    if asked.mutations and problem.kind == "code":
        solutions += _wrong(solutions, results, asked, run, said)
    return problem.model_copy(update={"solutions": solutions}), said


def _by_answer(problem: Problem, solution: Solution, said: Counter[str]) -> Solution:
    correct = final_answer(solution.code) == problem.answer
    said["passed" if correct else "failed"] += 1
    return solution.model_copy(update={"correct": correct})


def _by_result(problem: Problem, solution: Solution, result: Result, said: Counter[str]) -> Solution:
    said[result.status] += 1
    correct = {"passed": True, "failed": False}.get(result.status, solution.correct)
    if result.status != "passed" and solution.correct:
        log.warning("problem %s, published as correct: %s (%s)", problem.id, result.status, result.detail)
    if correct is not solution.correct and solution.correct is not None:
        said["contradicted"] += 1
    return solution.model_copy(update={"correct": correct})


def _wrong(
    solutions: list[Solution],
    results: dict[str, Result],
    asked: Labelling,
    run: Callable[..., Result | None],
    said: Counter[str],
) -> list[Solution]:
    """At most `asked.mutations` changes of one solution, none of which is there already."""
    original = _passing(solutions, results, run)
    if original is None:
        said["without a passing solution"] += 1
        return []
    code, seconds = original
    # an endless loop is found out soon, and is no label: it might only be slow
    within = replace(asked.limits, cpu_seconds=min(asked.limits.cpu_seconds, max(1, math.ceil(10 * seconds))))
    there = {solution.code for solution in solutions}
    wrong: list[Solution] = []
    crashing: list[Solution] = []
    for changed in islice(mutants(code, asked.seed), _TRIES * asked.mutations):
        if changed not in there and (result := run(changed, within)) is not None:
            said[f"change {result.status}"] += 1
            if result.status == "failed":
                (wrong if result.wrong_answer else crashing).append(Solution(code=changed, correct=False))
                if len(wrong) == asked.mutations:
                    break
    return (wrong + crashing)[: asked.mutations]


def _passing(
    solutions: list[Solution], results: dict[str, Result], run: Callable[..., Result | None]
) -> tuple[str, float] | None:
    """The first Python solution that is correct and passes when it is run, and its CPU seconds."""
    for solution in solutions:
        if solution.language == "python" and solution.correct:
            result = results.get(solution.code) or run(solution.code)
            if result is not None and result.status == "passed":
                return solution.code, result.cpu_seconds
    return None
