"""Whole runs with every family: they learn, and a stop in the middle changes nothing."""

import shutil

import pytest
import torch

from tests.training.stopping import StopAfter
from wmtp_worker.checkpoint.export import save_weights
from wmtp_worker.errors import InputError, Interrupted
from wmtp_worker.model.value import value_from
from wmtp_worker.settings import load
from wmtp_worker.settings.files import configs
from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.tracking.metrics import read

QUICK = ("evaluation.every=0", "checkpoint.every=100")
ALL = "data.solutions=all"


@pytest.fixture(scope="module")
def frozen(tiny_model_folder, tmp_path_factory):
    """A work directory's frozen models: the reference by name, and the value model of a run."""
    workdir = tmp_path_factory.mktemp("frozen")
    shutil.copytree(tiny_model_folder, workdir / "models" / "reference")
    value = value_from(tiny_model_folder, 1, width=8, seed=3)
    torch.nn.init.normal_(value.head.output.weight, generator=torch.Generator().manual_seed(1))
    (workdir / "checkpoints" / "judge").mkdir(parents=True)
    facts = {"step": 1, "config": value.config.to_dict()}
    save_weights(workdir / "checkpoints" / "judge" / "final.pt", dict(value.named_parameters()), facts)
    return workdir


@pytest.fixture(scope="module")
def with_cache(frozen):
    """The same for another run: what was scored once is not scored again."""

    def copy(workdir):
        for part in ("models", "checkpoints/judge", "cache"):
            if (frozen / part).exists():
                shutil.copytree(frozen / part, workdir / part)
        return workdir

    return copy


def steps(workdir):
    return [line for line in read(RunPaths(workdir, "tiny").metrics) if line["kind"] == "train"]


REFERENCE, VALUE = "weighting.reference=reference", "weighting.critic.value=judge"
RECIPES = {
    "baseline": (),
    "critic": (VALUE,),
    "verifiable": (VALUE,),
    "rho1_weighted": (REFERENCE,),
    "rho1_tokenskip": (REFERENCE,),
    "gradient": (),
    "grpo": (),
    "random_matched": (),
    "shuffled": (),
}


def of_recipe(name):
    """What a recipe sets, as overrides: the tiny run has its own preset."""
    chosen = load(recipe=name, overrides=RECIPES[name], environ={})
    return [
        f"{key}={chosen.flat()[key]}" for key, source in chosen.sources.items() if f"recipe.{name}.yaml" in source
    ] + list(RECIPES[name])


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_learns(recipe, tiny_run, frozen):
    assert set(RECIPES) == {path.name.split(".")[1] for path in configs().glob("recipe.*.yaml")}
    learning = ("training.max_steps=16", "training.lr=1e-2", "training.accumulation=1", *QUICK)
    tiny_run(frozen, *of_recipe(recipe), *learning, resume="never")
    lines = steps(frozen)
    losses = [line["unweighted_loss"] for line in lines]
    assert sum(losses[-3:]) < 0.93 * sum(losses[:3])
    for line in lines:
        assert line["loss"] == pytest.approx(sum(line["head_loss"]) / 2)
        assert line["unweighted_loss"] == pytest.approx(sum(line["unweighted_head_loss"]) / 2)
        assert line["weight_mean"] == pytest.approx(1, abs=1e-4) or recipe == "grpo"
    # not each: a step may hold one solution alone, and gradients tell little of a policy that knows nothing yet
    assert (max(line["weight_std"] for line in lines) > 0.01) == (recipe != "baseline")
    alike = all(line["loss"] == pytest.approx(line["unweighted_loss"], rel=1e-6) for line in lines)
    assert alike == (recipe == "baseline")
    log = RunPaths(frozen, "tiny").training_log.read_text()
    assert ("  weights ±" in log) == (recipe != "baseline")


RESUMED = {
    "gradient": ("weighting.family=gradient", "weighting.warmup=2"),
    "critic": ("weighting.family=critic", VALUE, "weighting.warmup=2", ALL, "weighting.critic.rewards=verifiable"),
    "shuffled": ("weighting.family=gradient", "weighting.control=shuffled", "weighting.warmup=2"),
    "random_matched": ("weighting.family=grpo", ALL, "weighting.control=random_matched"),
    "grpo_kl": ("weighting.family=grpo", ALL, "weighting.grpo.kl=0.1", REFERENCE),
    "lora": ("lora.rank=2", "lora.dropout=0.1", "weighting.family=rho1_weighted", REFERENCE),
}


@pytest.mark.parametrize("family", RESUMED)
def test_a_stop_in_the_middle_changes_no_bit(family, tiny_run, run_record, tmp_path, frozen, with_cache):
    chosen = (*RESUMED[family], "training.max_steps=7", "checkpoint.every=50", "evaluation.max_batches=1")
    straight, stopped = with_cache(tmp_path / "straight"), with_cache(tmp_path / "stopped")
    tiny_run(straight, *chosen)
    with pytest.raises(Interrupted, match=r"saved: .*step_3"):
        tiny_run(stopped, *chosen, stop=StopAfter(8))
    assert tiny_run(stopped, *chosen).resumed_from == 3
    assert run_record(stopped) == run_record(straight)
    if family == "lora":
        final = torch.load(RunPaths(straight, "tiny").final, weights_only=True)
        adapters = [name for name in final["model"] if ".lora_B." in name]
        assert len(adapters) == 4 * 7
        assert all(final["model"][name].any() for name in adapters)
        # only adapters are trained: a checkpoint holds the rest once
        sizes = [path.stat().st_size for path in RunPaths(straight, "tiny").step(7).glob("*.safetensors")]
        shared = [path.stat().st_size for path in RunPaths(straight, "tiny").shared.iterdir()]
        assert sum(sizes) < sum(shared)


def test_another_reference_is_another_training(tiny_run, tmp_path, frozen, with_cache):
    workdir = with_cache(tmp_path)
    chosen = ("weighting.family=rho1_tokenskip", REFERENCE, "training.max_steps=2", *QUICK)
    tiny_run(workdir, *chosen)
    config = workdir / "models" / "reference" / "config.json"
    config.write_text(config.read_text().replace("1e-06", "1e-05"))
    with pytest.raises(InputError, match=r"weighting\.reference: 'sha256 \w+' in the checkpoint, .* \(reference\)"):
        tiny_run(workdir, *chosen)
