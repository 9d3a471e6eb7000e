"""Everything that is refused: one clear line each, with the value, its origin and what to set instead."""

import os
import subprocess
import sys
import tempfile

import pytest

from wmtp_worker.errors import SettingsError
from wmtp_worker.settings import load

# a value head that is trained on beside the policy
SKIPS = ["weighting.family=rho1_tokenskip", "weighting.reference=/m", "weighting.normalise=mean1_clip"]
BESIDE = ("weighting.family=critic", "weighting.critic.auxiliary=0.1", "value.trunk_head=true", "data.solutions=all")


def refusal(**arguments):
    with pytest.raises(SettingsError) as caught:
        load(**{"environ": {}, **arguments})
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "training.lrr=1",
            "unknown setting 'training.lrr' (from --set training.lrr=1) -> did you mean training.lr?",
        ),
        ("lr=1", "unknown setting 'lr' (from --set lr=1) -> did you mean training.lr?"),
        ("trainig.lr=1", "unknown setting 'trainig.lr' (from --set trainig.lr=1) -> did you mean training.lr?"),
        ("zzzz=1", "unknown setting 'zzzz' (from --set zzzz=1) -> `wmtp settings show` lists them all"),
        (
            "weighting=1",
            "weighting is a group of settings, not a setting (from --set weighting=1) -> set one of weighting.family",
        ),
        (
            "preset=smoke",
            "preset cannot be set by another setting (from --set preset=smoke) "
            "-> choose it with --preset or WMTP_PRESET",
        ),
        ("training.lr", "--set training.lr has no value -> write --set key=value, as --set training.lr=1e-4"),
        (
            "training.lr=abc",
            "training.lr='abc' is not a number (from --set training.lr=abc) -> set a number, as 0.1 or 1e-4",
        ),
        ("training.lr=", "training.lr=null is not a number (from --set training.lr=)"),
        ("training.lr=true", "training.lr=true is not a number"),
        ("training.lr=.nan", "training.lr=nan is not a number"),
        ("training.lr=.inf", "training.lr=inf is not a number"),
        ("training.lr=0", "training.lr=0 is out of range (from --set training.lr=0) -> set a number greater than 0"),
        ("training.lr=[1", "training.lr='[1' is not valid YAML (from --set training.lr=[1) -> give a plain value"),
        ("training.lr=!!python/name:os.system x", "is not valid YAML"),
        ("training.max_steps=1.5", "training.max_steps=1.5 is not a whole number"),
        ("training.max_steps=true", "training.max_steps=true is not a whole number"),
        ("training.max_steps='9'", "training.max_steps='9' is not a whole number"),
        (
            "training.min_lr_ratio=1.1",
            "is out of range (from --set training.min_lr_ratio=1.1) -> set a number at most 1",
        ),
        ("training.min_lr_ratio=-1", "-> set a number at least 0"),
        ("training.beta2=1", "-> set a number less than 1"),
        ("training.moments=bf8", "training.moments"),
        (
            "training.precision=bf61",
            "is not one of its choices (from --set training.precision=bf61) -> did you mean bf16?",
        ),
        ("host.threads=1000000000", "host.threads=1000000000 is out of range"),
        ("run.seed=100000000000000000000", "run.seed=100000000000000000000 is out of range"),
        ("run.workdir=/tmp/\udcff", "is not UTF-8 text"),
        ("model.layers=0", "model.layers=0 is out of range (from --set model.layers=0) -> set a number at least 1"),
        ("model.tie_embeddings=1", "model.tie_embeddings=1 is neither true nor false"),
        ("checkpoint.every=0", "-> use one of those, for example 200"),
        ("data.dataset=", "data.dataset=null is not text"),
        ("run.accept_changes=3", "run.accept_changes=3 is not a list"),
        ("run.accept_changes=[3]", "run.accept_changes=[3] is not text"),
        ("run.accept_changes=trainin.lr", "unknown setting 'trainin.lr'"),
        ("run.name=a/b", "run.name='a/b' is no name for a run (from --set run.name=a/b) -> use letters and digits"),
        ("run.name=..", "run.name='..' is no name for a run"),
        ("run.name=a..b", "run.name='a..b' is no name for a run"),
        ("run.name=-x", "run.name='-x' is no name for a run"),
        ("run.name=é", "run.name='é' is no name for a run"),
        (f"run.name={'a' * 101}", "is no name for a run"),
        ("run.name=a\n", "is no name for a run"),
        ("run.resume=-1", "run.resume=-1 is neither auto, never nor a step"),
        ("run.resume=true", "run.resume=true is neither auto, never nor a step"),
        ("run.resume=latest", "run.resume='latest' is neither auto, never nor a step"),
        ("run.workdir=", "run.workdir=null is no path"),
        ("cloud.provider=s3", "cloud.provider=s3 (--set cloud.provider=s3) needs a bucket"),
        *(
            (
                f"{key}={value}",
                f"{key}={value} is out of range (from --set {key}={value}) -> set a number greater than 0",
            )
            for key in ("weighting.critic.beta", "weighting.grpo.beta", "weighting.rho1.temperature", "weighting.max")
            for value in (0, -1)
        ),
        ("weighting.rho1.share=0", "weighting.rho1.share=0 is out of range"),
        ("weighting.rho1.share=1.1", "-> set a number at most 1"),
        ("weighting.min=-1", "weighting.min=-1 is out of range"),
        ("weighting.ema_decay=1", "weighting.ema_decay=1 is out of range"),
        ("weighting.max=.inf", "weighting.max=inf is not a number"),
        ("weighting.family=rho1_tokenskp", "did you mean rho1_tokenskip?"),
        ("lora.targets=[]", "lora.targets=[] is wrong"),
        ("lora.alpha=0", "lora.alpha=0 is out of range"),
        ("cloud.provider=floppy", "-> set one of local, s3, gcs, azure"),
    ],
)
def test_one_wrong_value(override, line):
    assert line in refusal(overrides=[override])


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["training.warmup_steps=11", "training.max_steps=10"],
            "training.warmup_steps=11 must not be greater than training.max_steps=10 "
            "(from --set training.warmup_steps=11 and --set training.max_steps=10) -> shorten the warm-up",
        ),
        (
            ["data.sequence_length=513"],
            "data.sequence_length=513 must not be greater than model.max_position_embeddings",
        ),
        (["data.sequence_length=4"], "data.sequence_length=4 must be greater than model.heads=4"),
        (["model.hidden_size=130"], "model.hidden_size=130 must be a multiple of model.attention_heads=4"),
        (["model.hidden_size=132"], "model.hidden_size=132 must be an even multiple of model.attention_heads=4"),
        (["model.key_value_heads=3"], "model.attention_heads=4 must be a multiple of model.key_value_heads=3"),
        (
            ["model.path=/m", "model.layers=3"],
            "model.layers has no effect while model.path='/m' (--set model.path=/m) (from --set model.layers=3)",
        ),
        (
            ["training.early_stopping.patience=2", "evaluation.every=0"],
            "training.early_stopping.patience counts validations, but evaluation.every=0 has only one",
        ),
        (
            ["weighting.min=3", "weighting.max=2"],
            "weighting.min=3.0 must not be greater than weighting.max=2.0 "
            "(from --set weighting.min=3 and --set weighting.max=2)",
        ),
        (
            ["weighting.normalise=mean1_clip", "weighting.min=1.5"],
            "with weighting.normalise=mean1_clip the mean 1 must lie between weighting.min=1.5 and weighting.max=5.0 "
            "(from --set weighting.min=1.5) -> move weighting.min",
        ),
        (
            ["weighting.normalise=mean1_clip", "weighting.max=0.5"],
            "(from --set weighting.max=0.5) -> move weighting.max to the other side of 1",
        ),
        (
            ["weighting.family=grpo", "data.solutions=all", "weighting.grpo.kl=0.1"],
            "weighting.family=grpo (--set weighting.family=grpo) with weighting.grpo.kl needs a reference model",
        ),
        (
            ["weighting.family=grpo"],
            "weighting.family=grpo (--set weighting.family=grpo) compares right and wrong solutions, "
            "but data.solutions=correct leaves the wrong ones out",
        ),
        (
            ["weighting.family=critic", "weighting.critic.value=/v", "weighting.critic.rewards=reward_model"],
            "weighting.critic.rewards=reward_model needs a reward model",
        ),
        (
            ["weighting.family=critic", "value.trunk_head=true", "value.backbone=/m"],
            "value.trunk_head is a head on the policy, value.backbone another model",
        ),
        (
            ["run.stage=value", "value.trunk_head=true", "value.lora_rank=2"],
            "value.trunk_head trains nothing of the trunk, value.lora_rank adapters on it",
        ),
        (
            [*BESIDE, "value.trunk_head=false"],
            "weighting.critic.auxiliary=0.1 (--set weighting.critic.auxiliary=0.1) trains on a head on the policy's "
            "trunk, but value.trunk_head=false makes another model",
        ),
        (
            [*BESIDE, "value.backbone=/m", "weighting.critic.value=/v"],
            "value.trunk_head is a head on the policy, value.backbone another model",
        ),
        ([*BESIDE, "data.solutions=correct"], "but data.solutions=correct leaves them out"),
        (
            ["weighting.family=critic", "run.stage=policy"],
            "run.stage=policy trains no value model, and weighting.critic.value names none (from --set run.stage=pol",
        ),
        (
            ["run.stage=value", "value.patience=2", "evaluation.every=0"],
            "value.patience counts validations, but there is only one, at the end",
        ),
        (["weighting.family=critic", f"run.name={'x' * 95}"], "-value', which is no name for a run"),
        (
            ["run.stage=value", "value.max_steps=9", "run.resume=10"],
            "run.resume=10 is beyond the value model's 9 steps",
        ),
        (["data.pairs.difficulty_bins=[[9, 7, 1]]"], "is not [low, high, weight]"),
        (["data.pairs.difficulty_bins=[[1.9, 2.9, 1]]"], "is not [low, high, weight] with whole numbers"),
        (
            ["data.pairs.difficulty_bins=[[4, 6, 1], [1, 4, 1]]"],
            "data.pairs.difficulty_bins: 1 to 4 and the bin from 4 overlap (from --set data.pairs.difficulty_bins=",
        ),
        (
            SKIPS,
            "weighting.min=0.1 with mean1_clip lifts the tokens that rho1_tokenskip skips "
            "(from --set weighting.normalise=mean1_clip) -> set weighting.normalise=mean1",
        ),
        (
            [*SKIPS, "weighting.min=0", "weighting.rho1.share=0.1"],
            "weighting.rho1.share=0.1 of the tokens at weighting.max=5 cannot have the mean 1",
        ),
        (
            ["weighting.family=grpo", "data.solutions=all", "weighting.min=0", "weighting.grpo.beta=0.005"],
            "exp(-weighting.grpo.clip / weighting.grpo.beta) = exp(-3 / 0.005) is 0, and so may be all weights",
        ),
        (["run.resume=201"], "run.resume=201 must not be greater than training.max_steps=200"),
    ],
)
def test_values_that_contradict_each_other(overrides, line):
    assert line in refusal(overrides=overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["training.warmup_steps=200"],
        ["data.sequence_length=512"],
        ["data.sequence_length=5"],
        ["model.path=/m", "data.sequence_length=4096"],
        ["model.path=/m", "model.heads=2"],
        ["run.resume=200"],
        ["run.stage=value", "value.max_steps=300", "run.resume=300"],
        ["weighting.family=critic", "run.name=" + "x" * 94],
        [*BESIDE],
        [*BESIDE, "run.stage=policy"],
        ["run.stage=policy"],
        ["weighting.family=critic", "run.stage=policy", "weighting.critic.value=/v"],
        ["weighting.critic.auxiliary=0.1"],  # of a family that is not chosen
        ["weighting.family=critic", "weighting.critic.value=/v", "run.name=" + "x" * 100],
        ["weighting.family=critic", "evaluation.every=0"],
        ["weighting.min=2", "weighting.max=2"],
        ["weighting.normalise=mean1_clip", "weighting.min=1", "weighting.max=1"],
        ["weighting.grpo.kl=0.1"],  # of a family that is not chosen
    ],
)
def test_the_edge_of_a_contradiction_is_allowed(overrides):
    assert load(overrides=overrides, environ={}).flat()


def test_everything_wrong_is_said_at_once(elsewhere):
    (elsewhere / ".env").write_text("WMTP_TRAINING__LRR=1\n")
    environ = {"WMTP_WORKDIRR": "x", "HF_TOKEN_FILE": "/nowhere"}
    text = refusal(overrides=["training.lr=x", "model.heads=0", "nonsense"], environ=environ)
    lines = text.splitlines()
    assert lines[0] == "6 settings are wrong:"
    assert all(line.startswith("  - ") for line in lines[1:])
    for word in ("WMTP_TRAINING__LRR", "WMTP_WORKDIRR", "HF_TOKEN_FILE", "training.lr=", "model.heads=", "nonsense"):
        assert word in text


def test_an_option_and_a_set_that_disagree():
    text = refusal(overrides=["run.name=a"], options={"run.name": "b"})
    assert text == "run.name is given twice (from --set run.name=a and --run-name b) -> keep one of the two"
    assert load(overrides=["run.name=a"], options={"run.name": "a"}, environ={}).run.name == "a"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"preset": "smok"}, "unknown preset 'smok' (from --preset) -> did you mean smoke? there are local-light"),
        ({"recipe": "zzz"}, "unknown recipe 'zzz' (from --recipe) -> there are baseline, critic, "),
        ({"environ": {"WMTP_RECIPE": "baselin"}}, "unknown recipe 'baselin' (from variable WMTP_RECIPE)"),
        ({"preset": "./gone.yaml"}, "preset file './gone.yaml' does not exist (from --preset) -> check the path"),
        ({"preset": "gone.yaml"}, "preset file 'gone.yaml' does not exist"),
        ({"preset": "/"}, "preset file '/' does not exist"),
        ({"preset": "x" * 300}, "unknown preset"),
    ],
)
def test_a_preset_or_recipe_that_is_not_there(arguments, line):
    text = refusal(**arguments)
    assert line in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("training:\n  lr: 1\n  lr: 2\n", "training.lr stands twice, first in line 2 (from mine.yaml:3)"),
        ("training: {}\nmodel: {}\ntraining: {}\n", "training stands twice, first in line 1 (from mine.yaml:3)"),
        ("training:\n  lr: [1\n", "malformed YAML: "),
        ("training:\n lr: 1\n  eps: 2\n", "(from mine.yaml:3)"),
        ("a: b: c\n", "(from mine.yaml:1)"),
        ("\tlr: 1\n", "malformed YAML"),
        ("- training\n", "mine.yaml is not a mapping of settings"),
        ("just text\n", "mine.yaml is not a mapping of settings"),
        ("training:\n  lrr: 1\n", "unknown setting 'training.lrr' (from mine.yaml:2) -> did you mean training.lr?"),
        ("trainin:\n  lr: 1\n", "unknown setting 'trainin' (from mine.yaml:1)"),
        ("training: 5\n", "training is a group of settings, not a setting (from mine.yaml:1)"),
        ("training:\n  lr: {a: 1}\n", "training.lr={'a': 1} is not a number (from mine.yaml:2)"),
        ("training:\n  lr: !!python/object:os.x 1\n", "malformed YAML: could not determine a constructor"),
        ("training:\n  max_steps: !!int x\n", "malformed YAML"),
        ("training: {lr: 1}\n---\ntraining: {lr: 2}\n", "malformed YAML: but found another document"),
        ("preset: x\n", "preset cannot be set by another setting (from mine.yaml:1)"),
        (b"run: {name: \xff}\n", "mine.yaml cannot be read: it is not UTF-8 text"),
        (b"run: {name: \x00}\n", "malformed YAML"),
    ],
)
def test_a_yaml_file_that_is_wrong(elsewhere, content, line):
    path = elsewhere / "mine.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert line in refusal(preset="mine.yaml")


def test_an_empty_yaml_file_changes_nothing(elsewhere):
    (elsewhere / "mine.yaml").write_text("# nothing\n")
    assert load(recipe="mine.yaml", environ={}).identity() == load(environ={}).identity()


def test_a_yaml_file_without_permission():
    with tempfile.NamedTemporaryFile(suffix=".yaml") as file:
        os.chmod(file.name, 0)
        us = os.geteuid()
        load(environ={})  # what is imported late may lie where only root may read
        if us == 0:
            os.seteuid(65534)  # root may read everything
        try:
            if not os.access(__file__, os.R_OK, effective_ids=True):
                pytest.skip("this checkout is readable by root alone")
            text = refusal(preset=file.name)
        finally:
            os.seteuid(us)
    assert f"{file.name} cannot be read: Permission denied" in text


def test_a_current_directory_that_is_gone(elsewhere):
    gone = elsewhere / "gone"
    gone.mkdir()
    os.chdir(gone)
    gone.rmdir()
    assert "run.workdir='./work' is relative to a current directory that is gone" in refusal()
    assert load(overrides=["run.workdir=/work"], environ={}).flat()
    os.chdir(elsewhere)


def test_a_settings_error_ends_the_command_with_78():
    command = [sys.executable, "-m", "wmtp_worker", "settings", "show", "--set", "training.lrr=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 78
    assert done.stdout == ""
    assert done.stderr == (
        "error: unknown setting 'training.lrr' (from --set training.lrr=1) -> did you mean training.lr?\n"
    )


def test_moments_in_bf16_need_averages_that_move():
    said = refusal(overrides=["training.moments=bf16", "training.beta2=0.999"])
    assert "training.beta2=0.999 moves a moment by less than bf16 can tell apart" in said
    assert "(from --set training.beta2=0.999) -> set training.beta2=0.99 or less, or training.moments=fp32" in said
