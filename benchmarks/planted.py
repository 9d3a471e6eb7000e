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
import logging
import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

# shuffled leaves grpo as it is: all tokens of a solution have one weight
CONTROLS = ("shuffled", "random_matched")
TUNING_SEED = 1000
REFERENCE = "reference"
_CPU_SECONDS = 0.08  # of a step, on one quiet core


@dataclass(frozen=True)
class Plan:
    """What all arms share. `rows` of `length` tokens a step; a point of the curves `every` steps."""

    steps: int = 300
    every: int = 25
    rates: tuple[float, ...] = (1.5e-3, 3e-3, 6e-3)
    rows: int = 16
    length: int = 124
    hidden: int = 64
    layers: int = 3
    heads: int = 2
    problems: int = 2000
    validation: int = 100
    data_seed: int = 7
    families: tuple[str, ...] = ("rho1_weighted", "rho1_tokenskip", "gradient", "grpo")

    def overrides(self, rate: float) -> list[str]:
        return [
            f"model.hidden_size={self.hidden}",
            f"model.intermediate_size={3 * self.hidden}",
            f"model.layers={self.layers}",
            "model.attention_heads=4",
            "model.key_value_heads=4",
            f"model.heads={self.heads}",
            f"model.max_position_embeddings={self.length}",
            "model.tokenizer=words",
            f"data.sequence_length={self.length}",
            f"training.micro_batch_size={self.rows}",
            f"training.max_steps={self.steps}",
            f"training.warmup_steps={self.steps // 20}",
            f"training.lr={rate}",
            "evaluation.every=0",
            "host.threads=1",
            "host.device=cpu",
            "logging.every=1000",
            f"checkpoint.every={self.every}",
            f"checkpoint.keep_every={self.every}",
            "checkpoint.background=false",
        ]


QUICK = Plan(
    steps=4, every=2, rates=(2e-3,), rows=2, hidden=16, layers=2, problems=8, validation=2, families=("rho1_weighted",)
)


@dataclass(frozen=True)
class Arm:
    """One side of the comparison: a recipe, a control on top, or uniform without the wrong solutions."""

    family: str
    control: str = "none"
    solutions: str = "all"

    @property
    def name(self) -> str:
        if self.control != "none":
            return f"{self.family}, {self.control}"
        return self.family if self.solutions == "all" else f"{self.family}, right solutions only"

    def overrides(self, seed: int) -> list[str]:
        own = [f"weighting.control={self.control}", f"data.solutions={self.solutions}"]
        return [*own, f"weighting.reference=work:{REFERENCE}-{seed}"] if self.family.startswith("rho1") else own


def arms(plan: Plan) -> list[Arm]:
    uniform = [Arm("uniform"), Arm("uniform", solutions="correct")]
    families = [Arm(family, control) for control in ("none", *CONTROLS) for family in plan.families]
    return uniform + [arm for arm in families if (arm.family, arm.control) != ("grpo", "shuffled")]


@dataclass(frozen=True)
class Job:
    """One run. `arm` None: the reference model, on clean data."""

    arm: Arm | None
    seed: int
    rate: float
    plan: Plan
    work: Path

    @property
    def name(self) -> str:
        if self.arm is None:
            return f"{REFERENCE}-{self.seed}"
        words = self.arm.name.replace(",", "").replace(" ", "-").replace("_", "-")
        return f"{words}-{self.seed}-{self.rate:g}"

    @property
    def result(self) -> Path:
        return self.work / "results" / f"{self.name}.json"

    def settings(self, workdir: Path | None = None) -> Any:
        from wmtp_worker.settings import load

        workdir = workdir or self.work
        overrides = [*self.plan.overrides(self.rate), f"run.seed={self.seed}"]
        if self.arm is None:
            overrides += ["data.dataset=clean"]
        else:
            overrides += ["data.dataset=noisy", *self.arm.overrides(self.seed)]
        final = f"{self.work}/checkpoints/{REFERENCE}-{self.seed}/final.pt"
        overrides = [one.replace(f"work:{REFERENCE}-{self.seed}", final) for one in overrides]
        recipe = "baseline" if self.arm is None or self.arm.family == "uniform" else self.arm.family
        options = {"run.name": self.name, "run.workdir": str(workdir)}
        return load(recipe=recipe, overrides=overrides, options=options, environ={})


def prepare(plan: Plan, work: Path) -> None:
    """The data sets and the tokenizer. Raises `SystemExit` where the folder holds the work of another plan."""
    import planted_data as data

    kept, wanted = work / "plan.json", json.dumps(asdict(plan))
    if kept.exists() and kept.read_text() != wanted:
        raise SystemExit(f"{work} is of another plan: name another --work, or delete it")
    data.write(work / "datasets" / "noisy", plan.problems, plan.validation, plan.data_seed)
    data.write(work / "datasets" / "clean", plan.problems, plan.validation, plan.data_seed + 1, noisy=False)
    data.write_tokenizer(work / "models" / "words")
    kept.write_text(wanted)


def carry_out(job: Job) -> dict[str, Any]:
    """Train the run to its end, look at each of its checkpoints, keep what was seen. In a process of its own."""
    import io

    from planted_probe import Probe
    from rich.console import Console

    from wmtp_worker.host.stop import StopRequest
    from wmtp_worker.training.run import run

    # what they warn of is the same each time: incorrect solutions are learned, references have no tokenizer
    logging.getLogger("wmtp_worker").setLevel(logging.ERROR)
    settings = job.settings()
    wall, cpu = time.perf_counter(), time.process_time()
    summary = run(settings, StopRequest(), Console(file=io.StringIO()))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    curve = Probe(settings).points()
    # less than all steps are taken by a process that goes on
    per_step = cpu / summary.steps_taken if summary.steps_taken == job.plan.steps else None
    found = {"seed": job.seed, "rate": job.rate, "seconds": round(wall, 1), "cpu seconds a step": per_step}
    found = {"arm": job.arm.name if job.arm else REFERENCE, **found, "curve": curve}
    job.result.parent.mkdir(exist_ok=True)
    job.result.with_suffix(".part").write_text(json.dumps(found))
    job.result.with_suffix(".part").replace(job.result)
    if job.arm is not None:
        shutil.rmtree(summary.paths.checkpoints)
    return found


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
        planted = found["curve"][-1]["losses"]["planted"]["head 1"]
        what = f"{found['arm']}, seed {found['seed']}, lr {found['rate']:g}: planted loss {planted:.3f}"
        print(f"{self._done}/{self._total}  {what}  {found['seconds']:.0f} s; {left / 60:.0f} min left", flush=True)


def study(plan: Plan, work: Path, seeds: int, jobs: int) -> dict[str, Any]:
    """Tune on uniform, train the references, then every arm with every seed. Returns the document to keep."""
    prepare(plan, work)
    wanted, uniform = arms(plan), Arm("uniform")
    total = len(plan.rates) + seeds * (1 + len(wanted))
    hours = total * plan.steps * _CPU_SECONDS / jobs / 60
    print(f"{total} runs of {plan.steps} steps, {jobs} at a time: about {hours:.0f} min on quiet cores", flush=True)
    crew = Crew(jobs, total)
    tuning = crew.run(Job(uniform, TUNING_SEED, rate, plan, work) for rate in plan.rates)
    rate = min(tuning, key=lambda found: final(found, "planted", "head 1"))["rate"]
    numbers = range(1, seeds + 1)
    references = crew.run(Job(None, seed, rate, plan, work) for seed in numbers)
    # seed by seed: stopped early, what is there can be compared
    runs = crew.run(Job(arm, seed, rate, plan, work) for seed in numbers for arm in wanted)
    tuned = {f"{found['rate']:g}": round(final(found, "planted", "head 1"), 4) for found in tuning}
    return {
        "plan": asdict(plan),
        "tuning of uniform: final planted loss by learning rate": tuned,
        "learning rate": rate,
        **summary(runs, plan),
        "cost": cost(plan, work, rate),
        "references": references,
        "runs": runs,
    }


def final(found: dict[str, Any], kind: str, what: str) -> float:
    return float(found["curve"][-1]["losses"][kind][what])


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

    def cpu(of: Callable[[], Any]) -> tuple[float, Any]:
        started = time.process_time()
        result = of()
        return time.process_time() - started, result

    seconds: dict[str, list[float]] = {family: [] for family in ("uniform", *plan.families)}
    with tempfile.TemporaryDirectory(dir=work) as folder:
        for name in ("datasets", "models"):
            (Path(folder) / name).symlink_to(work / name)
        jobs = {family: Job(Arm(family), 1, rate, plan, work) for family in seconds}
        settings = {family: job.settings(Path(folder)) for family, job in jobs.items()}
        first, _ = cpu(lambda: open_session(settings["rho1_weighted"]))
        again, _ = cpu(lambda: open_session(settings["rho1_weighted"]))
        sessions = {family: open_session(one, trains=True) for family, one in settings.items()}
        for session in sessions.values():
            train_step(session)  # the first one allocates
        for _ in range(min(rounds, plan.steps - 1)):
            for family, session in sessions.items():
                seconds[family].append(cpu(lambda session=session: train_step(session))[0])
        for session in sessions.values():
            session.metrics.close()
    uniform = seconds["uniform"]
    ratios = {
        family: statistics.median(own / base for own, base in zip(values, uniform, strict=True))
        for family, values in seconds.items()
    }
    medians = {family: statistics.median(values) for family, values in seconds.items()}
    return {"cpu seconds a step": medians, "against uniform": ratios, "scoring, cpu seconds": max(first - again, 0.0)}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each with one thread")
    parser.add_argument("--steps", type=int, default=Plan.steps)
    parser.add_argument("--work", type=Path, default=Path("work/planted"), help="where runs and their results are kept")
    parser.add_argument("--quick", action="store_true", help="a few tiny steps, to see that it works")
    return parser.parse_args()


def main() -> None:
    from common import record
    from planted_picture import draw

    given = arguments()
    plan = QUICK if given.quick else replace(Plan(), steps=given.steps, every=given.steps // 12)
    work = given.work.absolute() / ("quick" if given.quick else "full")
    work.mkdir(parents=True, exist_ok=True)
    document = study(plan, work, given.seeds, given.jobs)
    if given.quick:
        draw(document, work / "planted.png")
        (work / "planted.json").write_text(json.dumps(document))
        return
    from common import RESULTS

    record("planted", document)
    draw(document, RESULTS / "planted.png")


if __name__ == "__main__":
    main()
