"""The learning rate, by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wmtp_worker.settings import EarlyStoppingSettings, TrainingSettings
from wmtp_worker.training.schedule import learning_rate


def training(**changes: float) -> TrainingSettings:
    values = {
        "max_steps": 110,
        "micro_batch_size": 1,
        "accumulation": 1,
        "lr": 2.0,
        "min_lr_ratio": 0.1,
        "warmup_steps": 10,
        "weight_decay": 0.0,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-8,
        "grad_clip": 1.0,
        "precision": "fp32",
        "moments": "fp32",
        "compile": "none",
        "label_smoothing": 0.0,
        "z_loss": 0.0,
        "checkpoint_activations": "none",
        "early_stopping": EarlyStoppingSettings(patience=0, min_delta=0.0),
    }
    return TrainingSettings(**(values | changes))


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 0.2),  # a tenth of the warm-up
        (4, 1.0),
        (9, 2.0),  # the last step of the warm-up has the whole rate
        (10, 2.0),  # the cosine starts at its top
        (35, 0.2 + 1.8 * 0.5 * (1 + math.sqrt(0.5))),  # a quarter of the 100 steps
        (60, 1.1),  # half way: the mean of 2.0 and 0.2
        (85, 0.2 + 1.8 * 0.5 * (1 - math.sqrt(0.5))),
        (110, 0.2),  # the end
        (111, 0.2),
        (10_000, 0.2),
    ],
)
def test_by_hand(step, rate):
    assert learning_rate(step, training()) == pytest.approx(rate, rel=1e-12)


def test_without_warm_up_the_first_step_has_the_whole_rate():
    assert learning_rate(0, training(warmup_steps=0)) == 2.0
    assert learning_rate(55, training(warmup_steps=0)) == pytest.approx(1.1)


def test_ratio_of_one_is_constant_and_of_zero_ends_at_zero():
    constant = training(min_lr_ratio=1.0)
    assert {learning_rate(step, constant) for step in range(10, 120)} == {2.0}
    assert learning_rate(110, training(min_lr_ratio=0.0)) == 0.0


def test_run_that_is_all_warm_up():
    short = training(max_steps=10, warmup_steps=10)
    assert [learning_rate(step, short) for step in range(10)] == pytest.approx([0.2 * step for step in range(1, 11)])


@given(
    st.integers(1, 300),
    st.integers(0, 50),
    st.floats(0, 1),
    st.floats(1e-8, 1),
)
def test_rises_through_the_warm_up_then_never_rises_and_stays_within_bounds(max_steps, warmup, ratio, lr):
    shape = training(max_steps=max_steps, warmup_steps=warmup, min_lr_ratio=ratio, lr=lr)
    rates = [learning_rate(step, shape) for step in range(max(max_steps, warmup) + 5)]
    assert rates[:warmup] == sorted(set(rates[:warmup]))
    after = rates[warmup:]
    assert after == sorted(after, reverse=True)
    assert after[0] == pytest.approx(lr)
    assert all(0 < rate <= lr * (1 + 1e-12) for rate in rates[:warmup])
    assert all(lr * ratio * (1 - 1e-12) <= rate <= lr * (1 + 1e-12) for rate in after)
