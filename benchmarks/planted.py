"""Weighted multi-token prediction where the right answer is known: every family against uniform and its own controls.

The data is that of `planted_data`: tokens that follow from the problem, planted among noise. Every arm has the same
model, data, order, steps and learning rate, which is the best of a grid for uniform on a seed of its own. Arms are run
by `training.run` as `wmtp train` does; what was run is not run again.

    python benchmarks/planted.py --seeds 3 --jobs 2       # results/planted.json and planted.png
    python benchmarks/planted.py --quick                  # that it works, in seconds
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from planted_runs import CRITICS, QUICK, Arm, Job, Plan, carry_out, prepare

TUNING_SEED = 1000
_CPU_SECONDS = 0.15  # of a step with what is around it, on a quiet core


class Crew:
    """Carries jobs out, several at a time, and says how long the rest will take."""

    def __init__(self, jobs: int, total: int) -> None:
        self._jobs, self._total, self._done, self._ran = jobs, total, 0, 0
        self._started = time.monotonic()

    def run(self, jobs: Iterable[Job]) -> list[dict[str, Any]]:
        """The results in the order of the jobs."""
        jobs = list(jobs)
        missing = [job for job in jobs if not job.result.exists()]
        self._done += len(jobs) - len(missing)
        if self._jobs == 1:
            for job in missing:
                self._tell(carry_out(job))
        elif missing:
            # spawned: torch's threads do not survive a fork
            with ProcessPoolExecutor(self._jobs, multiprocessing.get_context("spawn")) as pool:
                for future in as_completed([pool.submit(carry_out, job) for job in missing]):
                    self._tell(future.result())
        return [json.loads(job.result.read_text()) for job in jobs]

    def _tell(self, found: dict[str, Any]) -> None:
        self._done += 1
        self._ran += 1
        left = (time.monotonic() - self._started) / self._ran * (self._total - self._done)
        if "curve" in found:
            says = f"planted loss {final(found, 'planted', 'head 1'):.3f}"
        else:
            says = f"pairwise accuracy {found['validation']['pairwise_accuracy']:.1%}"
        what = f"{found['arm']}, seed {found['seed']}, lr {found['rate']:g}: {says}"
        print(f"{self._done}/{self._total}  {what}  {found['seconds']:.0f} s; {left / 60:.0f} min left", flush=True)


def study(plan: Plan, work: Path, seeds: int, jobs: int) -> dict[str, Any]:
    """Tune on uniform, train what the families need, then every arm. Returns the document to keep."""
    prepare(plan, work)
    arms, uniform = plan.arms(), Arm("uniform")
    critics = [Arm(family) for family in plan.families if family in CRITICS]
    total = len(plan.rates) + seeds * (1 + len(critics) + len(arms))
    minutes = total * plan.steps * _CPU_SECONDS / jobs / 60
    print(f"{total} runs of {plan.steps} steps, {jobs} at a time: about {minutes:.0f} min on quiet cores", flush=True)
    crew = Crew(jobs, total)
    tuning = crew.run(Job(uniform, TUNING_SEED, rate, plan, work) for rate in plan.rates)
    rate = min(tuning, key=lambda found: final(found, "planted", "head 1"))["rate"]
    numbers = range(1, seeds + 1)
    references = crew.run(Job(uniform, seed, rate, plan, work, "reference") for seed in numbers)
    values = crew.run(Job(arm, seed, rate, plan, work, "value") for seed in numbers for arm in critics)
    # seed by seed: stopped early, what is there can be compared
    runs = crew.run(Job(arm, seed, rate, plan, work) for seed in numbers for arm in arms)
    tuned = {f"{found['rate']:g}": round(final(found, "planted", "head 1"), 4) for found in tuning}
    spent: dict[str, list[float]] = {}
    for found in (*references, *values):
        spent.setdefault(found["arm"], []).append(found["cpu seconds"] or math.nan)
    return {
        "plan": asdict(plan),
        "tuning of uniform: final planted loss by learning rate": tuned,
        "learning rate": rate,
        **summary(runs, plan),
        "cost": {"training, cpu seconds": {name: statistics.median(some) for name, some in spent.items()}}
        | cost(plan, work, rate),
        "references, at the end": [last(found) for found in references],
        "value models": [{key: found[key] for key in ("arm", "seed", "validation")} for found in values],
        "runs": runs,
    }


def final(found: dict[str, Any], kind: str, what: str) -> float:
    return float(found["curve"][-1]["losses"][kind][what])


def last(found: dict[str, Any]) -> dict[str, Any]:
    return {"seed": found["seed"], **found["curve"][-1]["losses"]}


def steps_to(found: dict[str, Any], target: float) -> float | None:
    """When head 1's planted loss first is `target` or less, straight lines between the points; None: never."""
    points = [(point["step"], point["losses"]["planted"]["head 1"]) for point in found["curve"]]
    for number, (step, loss) in enumerate(points):
        if loss <= target:
            if number == 0:
                return float(step)
            before, higher = points[number - 1]
            return before + (step - before) * (higher - target) / (higher - loss)
    return None


def summary(runs: list[dict[str, Any]], plan: Plan) -> dict[str, Any]:
    """The target, which uniform alone decides, and each arm's numbers as [mean, deviation] over its seeds."""
    by_arm: dict[str, list[dict[str, Any]]] = {}
    for found in runs:
        by_arm.setdefault(found["arm"], []).append(found)
    uniform = {found["seed"]: found for found in by_arm["uniform"]}
    at = 0.8 * plan.steps
    point = next(i for i, point in enumerate(by_arm["uniform"][0]["curve"]) if point["step"] >= at)
    target = statistics.fmean(found["curve"][point]["losses"]["planted"]["head 1"] for found in uniform.values())
    table = {name: _row(found, uniform, target) for name, found in by_arm.items()}
    share = by_arm["uniform"][0]["curve"][-1]["share"]
    return {"target": target, "share of the labels": share, "arms": table}


def _row(found: list[dict[str, Any]], uniform: dict[int, dict[str, Any]], target: float) -> dict[str, Any]:
    def over_seeds(of: Callable[[dict[str, Any]], float]) -> list[float]:
        values = [of(one) for one in found]
        return [statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0]

    def mass(kind: str) -> Callable[[dict[str, Any]], float]:
        return lambda one: statistics.fmean(point["mass"][kind] for point in one["curve"])

    reached = [steps for one in found if (steps := steps_to(one, target)) is not None]
    return {
        "planted loss": over_seeds(lambda one: final(one, "planted", "head 1")),
        "planted loss, all heads": over_seeds(lambda one: final(one, "planted", "heads")),
        "planted loss less uniform's": over_seeds(
            lambda one: final(one, "planted", "head 1") - final(uniform[one["seed"]], "planted", "head 1")
        ),
        "planted accuracy": over_seeds(lambda one: final(one, "planted", "accuracy")),
        "noise loss": over_seeds(lambda one: final(one, "noise", "head 1")),
        "seeds": len(found),
        "seeds that reach the target": len(reached),
        "steps to the target": [statistics.fmean(reached), statistics.stdev(reached) if len(reached) > 1 else 0.0]
        if reached
        else None,
        "mass": {kind: over_seeds(mass(kind)) for kind in ("planted", "mistaken", "noise")},
    }


def cost(plan: Plan, work: Path, rate: float, rounds: int = 12) -> dict[str, Any]:
    """CPU seconds of a step of each family, alternated, and of scoring the training split once."""
    from planted_probe import open_session

    from wmtp_worker.training.loop import train_step
    from wmtp_worker.training.prefetch import Prefetcher

    def cpu(of: Callable[[], Any]) -> tuple[float, Any]:
        started = time.process_time()
        result = of()
        return time.process_time() - started, result

    families = ("uniform", *plan.families)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        for name in ("datasets", "models", "checkpoints"):
            (Path(folder) / name).symlink_to(work / name)
        settings = {family: Job(Arm(family), 1, rate, plan, work).settings(Path(folder)) for family in families}
        # what frozen models say is computed by the first one that asks, and read from the disk by the second
        scoring = {}
        for family in families:
            first, _ = cpu(lambda family=family: open_session(settings[family]))
            again, _ = cpu(lambda family=family: open_session(settings[family]))
            scoring[family] = max(first - again, 0.0)
        sessions = {family: open_session(one, trains=True) for family, one in settings.items()}
        seconds: dict[str, list[float]] = {family: [] for family in families}
        for _ in range(min(rounds + 1, plan.steps)):
            for family, session in sessions.items():
                with Prefetcher(session.task.data, session.settings.training, session.group) as ahead:
                    seconds[family].append(cpu(lambda session=session, ahead=ahead: train_step(session, ahead))[0])
        seconds = {family: measured[1:] for family, measured in seconds.items()}  # the first one allocates
        for session in sessions.values():
            session.metrics.close()
    uniform = seconds["uniform"]
    ratios = {
        family: statistics.median(own / base for own, base in zip(values, uniform, strict=True))
        for family, values in seconds.items()
    }
    medians = {family: statistics.median(values) for family, values in seconds.items()}
    return {"cpu seconds a step": medians, "against uniform": ratios, "scoring, cpu seconds": scoring}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each with one thread")
    parser.add_argument("--steps", type=int, default=Plan.steps)
    parser.add_argument("--work", type=Path, default=Path("work/planted"), help="where runs and their results are kept")
    parser.add_argument("--quick", action="store_true", help="a few tiny steps, to see that it works")
    return parser.parse_args()


def markdown(document: dict[str, Any]) -> str:
    """The table for people: mean ± deviation over the seeds."""
    share, spent = document["share of the labels"], document["cost"]
    lines = [
        "| arm | planted loss | less uniform's, paired | right | steps to the target | weight on planted / mistaken / "
        "noise | CPU of a step, against uniform |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in document["arms"].items():
        mass = " / ".join(f"{100 * row['mass'][kind][0]:.1f} %" for kind in ("planted", "mistaken", "noise"))
        steps = "never" if row["steps to the target"] is None else _spread(row["steps to the target"], 0)
        if 0 < row["seeds that reach the target"] < row["seeds"]:
            steps += f" ({row['seeds that reach the target']} of {row['seeds']} seeds)"
        ratio = spent["against uniform"].get(name)
        cells = [
            name,
            _spread(row["planted loss"], 3),
            _spread(row["planted loss less uniform's"], 3),
            f"{100 * row['planted accuracy'][0]:.1f} %",
            steps,
            mass,
            f"{100 * (ratio - 1):+.0f} %" if ratio else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    labels = ", ".join(f"{name} {100 * part:.1f} %" for name, part in share.items())
    return "\n".join([*lines, "", f"Target: {document['target']:.4f} nats. Labels: {labels}."])


def _spread(values: list[float], digits: int) -> str:
    return f"{values[0]:.{digits}f} ± {values[1]:.{digits}f}"


def rounded(found: Any) -> Any:
    """Five digits of every number say all there is to say."""
    if isinstance(found, dict):
        return {name: rounded(value) for name, value in found.items()}
    if isinstance(found, list):
        return [rounded(value) for value in found]
    return float(f"{found:.5g}") if isinstance(found, float) else found


def main() -> None:
    from common import RESULTS, record
    from planted_picture import draw

    given = arguments()
    plan = QUICK if given.quick else replace(Plan(), steps=given.steps, every=given.steps // 12)
    work = given.work.absolute() / ("quick" if given.quick else "full")
    work.mkdir(parents=True, exist_ok=True)
    document = rounded(study(plan, work, given.seeds, given.jobs))
    draw(document, (work if given.quick else RESULTS) / "planted.png")
    if not given.quick:
        lines = [json.dumps(found) + "\n" for found in document["runs"]]
        (RESULTS / "planted_runs.jsonl").write_text("".join(lines))
        record("planted", {name: value for name, value in document.items() if name != "runs"})
    print(markdown(document))


if __name__ == "__main__":
    main()
