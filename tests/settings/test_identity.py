"""What counts as the same training."""

import hashlib
import json

import pytest

from wmtp_worker.settings import load
from wmtp_worker.settings.schema import MODEL_SHAPE
from wmtp_worker.settings.stages import policy_run, value_run


def settings(*overrides, **arguments):
    return load(overrides=overrides, environ={}, **arguments)


@pytest.mark.parametrize(
    "override",
    [
        "run.seed=1",
        "training.lr=1e-5",
        "training.max_steps=99",
        "training.early_stopping.patience=3",
        "training.label_smoothing=0.1",
        "training.z_loss=1e-4",
        "model.layers=5",
        "model.heads=2",
        "data.sequence_length=64",
        "data.packing=false",
        "evaluation.every=7",
        "data.solutions=all",
        "lora.rank=4",
        "weighting.family=gradient",
    ],
)
def test_what_changes_the_numbers_changes_the_digest(override):
    assert settings(override).digest() != settings().digest()


@pytest.mark.parametrize(
    "override",
    [
        "run.name=other",
        "run.workdir=/elsewhere",
        "run.resume=never",
        "run.accept_changes=training.lr",
        "host.device=cpu",
        "host.threads=1",
        "model.tokenizer=/somewhere",
        "data.dataset=/somewhere",
        "data.format=mbpp",
        "training.checkpoint_activations=full",
        "lora.alpha=3",
        "weighting.control=shuffled",
        "weighting.max=3",
        "weighting.rho1.share=0.5",
        "weighting.reference=/somewhere",
        "weighting.critic.value=/somewhere",
        "checkpoint.every=3",
        "checkpoint.keep_last=9",
        "logging.level=debug",
    ],
)
def test_what_does_not_change_the_numbers_does_not(override):
    key = override.partition("=")[0]
    assert settings(override).flat()[key] != settings().flat()[key]
    assert settings(override).digest() == settings().digest()


def test_the_same_values_by_another_way_are_the_same_training(tmp_path):
    (tmp_path / "copy.yaml").write_text("training: {lr: 5.0e-4}\n")
    assert settings("training.lr=5e-4").digest() == settings(recipe=str(tmp_path / "copy.yaml")).digest()


def test_the_digest_is_that_of_canonical_json():
    identity = settings().identity()
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    assert settings().digest() == hashlib.sha256(text.encode()).hexdigest()


def test_a_shape_that_has_no_effect_is_no_part_of_the_identity():
    assert set(MODEL_SHAPE) <= set(settings().identity())
    from_folder = settings("model.path=/model")
    assert not set(MODEL_SHAPE) & set(from_folder.identity())
    assert settings("model.path=/copy/of/it").digest() == from_folder.digest()


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("rho1_weighted", ("weighting.rho1.share=0.5", "weighting.control=shuffled", "weighting.max=3")),
        ("gradient", ("weighting.gradient.outlier=2", "weighting.normalise=none", "weighting.warmup=3")),
    ],
)
def test_a_family_reads_its_own_settings(family, overrides):
    chosen = (f"weighting.family={family}", "weighting.reference=/m", "lora.rank=2")
    digest = settings(*chosen).digest()
    for override in (*overrides, "lora.alpha=3"):
        assert settings(*chosen, override).digest() != digest, override
    for override in ("weighting.critic.beta=2", "weighting.grpo.clip=2", "weighting.reference=/other"):
        assert settings(*chosen, override).digest() == digest, override


BESIDE = ("weighting.family=critic", "weighting.critic.auxiliary=0.1", "value.trunk_head=true", "data.solutions=all")


def test_what_a_head_beside_the_policy_learns_counts():
    def differ(*chosen):
        return settings(*chosen).digest() != settings(*chosen[:-1]).digest()

    assert differ(*BESIDE, "weighting.critic.auxiliary=0.2")
    assert differ(*BESIDE, "value.objective=lambda_return")
    assert differ(*BESIDE, "data.pairs.length_share=0.5")
    assert not differ(*BESIDE, "value.objective=lambda_return", "data.pairs.length_share=0.5")
    assert not differ(*BESIDE, "data.pairs.per_problem=2")
    assert not differ(*BESIDE, "value.max_steps=3")
    assert differ(*BESIDE, "run.stage=policy", "value.hidden=8")
    # it has the width of the one that it was before
    assert not differ(*BESIDE, "weighting.critic.value=/v", "value.hidden=8")
    # frozen, it is in the identity as it was before there was a choice
    assert "weighting.critic.auxiliary" not in settings("weighting.family=critic").identity()


def values(*overrides):
    return value_run(settings("run.stage=value", *overrides))


@pytest.mark.parametrize(
    "override",
    [
        *(
            "run.seed=1",
            "value.objective=lambda_return",
            "value.hidden=8",
            "value.trunk_head=true",
            "value.lora_rank=2",
        ),
        *("value.max_steps=99", "value.lr=1e-5", "value.micro_batch_size=3", "value.evaluation_every=7"),
        *("value.patience=9", "data.pairs.per_problem=2", "data.pairs.length_share=0.5", "training.weight_decay=0.2"),
        *("model.layers=5", "data.sequence_length=64", "evaluation.max_batches=3"),
    ],
)
def test_what_changes_the_values_numbers(override):
    assert values(override).digest() != values().digest()
    # the policy's follow from the value model's weights, which are compared themselves
    chosen = ("weighting.family=critic", "weighting.critic.value=/v")
    same = settings(*chosen, override).digest() == settings(*chosen).digest()
    assert same == override.startswith(("value.", "data.pairs."))


@pytest.mark.parametrize(
    "override",
    [
        *("data.solutions=all", "weighting.family=gradient", "lora.rank=2", "weighting.critic.gamma=0.5"),
        *("weighting.critic.beta=2", "run.name=other", "checkpoint.every=3"),
    ],
)
def test_what_does_not_change_the_values_numbers(override):
    assert values(override).digest() == values().digest()


def test_values_read_further_settings_where_they_need_them():
    def differ(*chosen):
        return values(*chosen).digest() != values(*chosen[:-1]).digest()

    assert differ("value.objective=lambda_return", "weighting.critic.gamma=0.5")
    assert differ("value.lora_rank=2", "lora.alpha=3")
    assert not differ("value.backbone=/m", "model.layers=5")


def test_a_value_run_follows_the_training_where_nothing_else_is_said():
    chosen = settings("weighting.family=critic", "training.max_steps=100", "training.warmup_steps=10", "run.resume=70")
    own = value_run(chosen)
    assert (own.run.name, own.run.stage, own.run.resume) == ("baseline-local-light-value", "value", "auto")
    assert own.training.model_dump(exclude={"early_stopping"}) == chosen.training.model_dump(exclude={"early_stopping"})
    assert policy_run(chosen).weighting.critic.value == own.run.name
    half = value_run(
        settings("weighting.family=critic", "value.max_steps=50", "training.warmup_steps=20", "value.lr=1")
    )
    assert (half.training.max_steps, half.training.warmup_steps, half.training.lr) == (50, 5, 1.0)
    assert policy_run(settings()) == settings()


def test_the_resolved_settings_are_json():
    flat = settings().flat()
    assert json.loads(json.dumps(flat)) == flat
