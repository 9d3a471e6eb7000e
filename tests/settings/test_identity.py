"""What counts as the same training."""

import hashlib
import json

import pytest

from wmtp_worker.settings import load
from wmtp_worker.settings.schema import MODEL_SHAPE


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


def test_the_resolved_settings_are_json():
    flat = settings().flat()
    assert json.loads(json.dumps(flat)) == flat
