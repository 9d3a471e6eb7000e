"""The runs of `planted.py`: their settings, and each carried out in a process of its own."""

import io
import json
import logging
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import planted_data as data

from wmtp_worker.settings import Settings, load
from wmtp_worker.settings.stages import value_name

CONTROLS = ("shuffled", "random_matched")
CRITICS = ("critic", "verifiable")


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
    families: tuple[str, ...] = ("rho1_weighted", "rho1_tokenskip", "critic", "verifiable", "gradient", "grpo")

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
            "value.patience=0",
            "host.threads=1",
            "host.device=cpu",
            "logging.every=1000",
            f"checkpoint.every={self.every}",
            f"checkpoint.keep_every={self.every}",
            "checkpoint.background=false",
        ]

    def arms(self) -> list["Arm"]:
        uniform = [Arm("uniform"), Arm("uniform", solutions="correct")]
        families = [Arm(family, control) for control in ("none", *CONTROLS) for family in self.families]
        # shuffled leaves grpo as it is: all tokens of a solution have one weight
        return uniform + [arm for arm in families if (arm.family, arm.control) != ("grpo", "shuffled")]


QUICK = Plan(
    steps=4,
    every=2,
    rates=(2e-3,),
    rows=2,
    hidden=16,
    layers=2,
    problems=8,
    validation=2,
    families=("rho1_weighted", "critic"),
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


@dataclass(frozen=True)
class Job:
    """One run: of an arm's policy, of its value model, or of a reference model (whatever the arm), on clean data."""

    arm: Arm
    seed: int
    rate: float
    plan: Plan
    work: Path
    trains: Literal["policy", "reference", "value"] = "policy"

    @property
    def what(self) -> str:
        """What is trained, for people."""
        if self.trains == "policy":
            return self.arm.name
        return "reference" if self.trains == "reference" else f"{self.arm.name}'s value model"

    @property
    def name(self) -> str:
        """The run's."""
        if self.trains == "reference":
            return _reference(self.seed)
        if self.trains == "value":
            return _critic(self.arm.family, self.seed)
        words = self.arm.name.replace(",", "").replace(" ", "-").replace("_", "-")
        return f"policy-{words}-{self.seed}-{self.rate:g}"

    @property
    def result(self) -> Path:
        return self.work / "results" / f"{self.name}.json"

    def settings(self, workdir: Path | None = None) -> Settings:
        """As `wmtp train --recipe …` has them; the recipe is changed in nothing but what it needs and the control."""
        family, seed, reference = self.arm.family, self.seed, _reference(self.seed)
        overrides = [*self.plan.overrides(self.rate), f"run.seed={seed}"]
        if self.trains == "reference":
            overrides += ["data.dataset=clean"]
        else:
            overrides += ["data.dataset=noisy", f"data.solutions={self.arm.solutions}"]
        if self.trains == "value":
            overrides += ["run.stage=value", f"value.backbone={reference}"]
        if self.trains == "policy":
            overrides += [f"weighting.control={self.arm.control}"]
            if family in CRITICS:
                overrides += [f"weighting.critic.value={value_name(_critic(family, seed))}"]
            elif family.startswith("rho1"):
                overrides += [f"weighting.reference={reference}"]
        recipe = "baseline" if self.trains == "reference" or family == "uniform" else family
        options = {"run.name": self.name, "run.workdir": str(workdir or self.work)}
        return load(recipe=recipe, overrides=overrides, options=options, environ={})


def _reference(seed: int) -> str:
    return f"reference-{seed}"


def _critic(family: str, seed: int) -> str:
    return f"{family}-{seed}"


def prepare(plan: Plan, work: Path) -> None:
    """The data sets and the tokenizer. Raises `SystemExit` where the folder holds the work of another plan."""
    kept, wanted = work / "plan.json", json.dumps(asdict(plan))
    if kept.exists() and kept.read_text() != wanted:
        raise SystemExit(f"{work} is of another plan: name another --work, or delete it")
    data.write(work / "datasets" / "noisy", plan.problems, plan.validation, plan.data_seed)
    data.write(work / "datasets" / "clean", plan.problems, plan.validation, plan.data_seed + 1, noisy=False)
    data.write_tokenizer(work / "models" / "words")
    kept.write_text(wanted)


def carry_out(job: Job) -> dict[str, Any]:
    """Train the run to its end, look at each of its checkpoints, keep what was seen. In a process of its own."""
    from planted_probe import Probe
    from rich.console import Console

    from wmtp_worker.assets.convert import convert
    from wmtp_worker.host.stop import StopRequest
    from wmtp_worker.training.run import run

    # what they warn of is the same each time: incorrect solutions are learned like correct ones
    logging.getLogger("wmtp_worker").setLevel(logging.ERROR)
    settings = job.settings()
    wall, cpu = time.perf_counter(), time.process_time()
    summary = run(settings, StopRequest(), Console(file=io.StringIO()))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    found: dict[str, Any] = {"arm": job.what, "seed": job.seed, "rate": job.rate, "seconds": round(wall, 1)}
    # not of a run that an earlier process began
    found["cpu seconds"] = round(cpu, 1) if summary.steps_taken == job.plan.steps else None
    if job.trains == "value":
        found["validation"] = summary.validation
    else:
        # what a reference makes of the noisy data is what weights follow from
        found["curve"] = Probe(settings, job.work / "datasets" / "noisy").points()
    if job.trains == "reference" and not (folder := job.work / "models" / job.name).exists():
        convert(summary.paths.final, folder, "ours", tokenizer=job.work / "models" / "words")
    job.result.parent.mkdir(exist_ok=True)
    job.result.with_suffix(".part").write_text(json.dumps(found))
    job.result.with_suffix(".part").replace(job.result)
    if job.trains == "policy":
        shutil.rmtree(summary.paths.checkpoints)
    return found
