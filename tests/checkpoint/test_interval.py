"""When to save: the formulas against what they approximate, and the policy on numbers worked out by hand."""

import itertools
import logging
import math
import random

import pytest

from wmtp_worker.checkpoint.interval import (
    DAY,
    FIRST,
    LONGEST,
    SHORTEST,
    History,
    IntervalPolicy,
    choose,
    daly,
    interruptions_per_day,
    spell,
    young,
)


def test_young_by_hand():
    assert young(2.0, 100.0) == 20.0


@pytest.mark.parametrize(("cost", "between"), [(0.5, DAY), (10.0, 3600.0), (300.0, 3600.0), (600.0, 7200.0)])
def test_daly_is_where_the_whole_model_is_least(cost, between):
    def time_of_the_work(interval):
        # Daly 2006, eq. 20: expected wall time of a unit of work, restarts left out, they do not move the optimum
        return math.expm1((interval + cost) / between) / interval

    best = daly(cost, between)
    least = min(time_of_the_work(best * 1.002**k) for k in range(-2000, 2001))
    assert time_of_the_work(best) == pytest.approx(least, rel=2e-4)


def test_daly_where_saves_are_cheap_is_youngs_and_where_they_are_not_has_limits():
    assert daly(0.01, DAY) == pytest.approx(young(0.01, DAY), rel=1e-3)
    assert daly(0.0, DAY) == 0.0
    assert daly(300.0, 100.0) == 100.0
    assert daly(1.0, math.inf) == math.inf


def test_the_rate_begins_with_the_prior_and_ends_with_what_was_seen():
    assert interruptions_per_day(0, 0.0) == 1.0
    assert interruptions_per_day(5, 1.0) == 3.0
    assert interruptions_per_day(300, 100.0) == pytest.approx(3.0, rel=0.01)
    assert interruptions_per_day(0, 29.0) == pytest.approx(1 / 30)


def test_choice_by_hand():
    # sqrt(2 * 0.5 * 86400) = 293.9, 42 steps of 7 s
    choice = choose(cost=0.5, carry=100.0, per_day=1.0, step_seconds=7.0)
    assert choice.seconds == pytest.approx(293.6, abs=0.2)
    assert choice.steps == 42
    assert str(choice) == (
        "every 42 steps of 7.0 s (wanted: 4.9 min): a save costs 0.5 s of training, an interruption every 24.0 h"
    )


@pytest.mark.parametrize(
    ("given", "seconds", "why"),
    [
        ({"cost": 0.5, "carry": 1700.0, "per_day": 1.0}, 1700.0, "it takes 28.3 min to carry one away"),
        ({"cost": 0.5, "carry": 5000.0, "per_day": 1.0}, 5000.0, "to carry one away"),
        ({"cost": 0.0, "carry": 0.0, "per_day": 1.0}, SHORTEST, "the shortest interval"),
        ({"cost": 60.0, "carry": 0.0, "per_day": 0.1}, LONGEST, "the longest interval"),
        ({"cost": 0.5, "carry": 0.0, "per_day": 0.0}, LONGEST, "no interruptions; the longest interval"),
    ],
)
def test_limits_of_the_choice(given, seconds, why):
    choice = choose(step_seconds=1.0, **given)
    assert choice.seconds == seconds
    assert why in choice.why


def test_a_step_longer_than_the_interval_is_saved_each_time():
    assert choose(cost=0.001, carry=0.0, per_day=8.0, step_seconds=500.0).steps == 1


def test_a_number_means_its_multiples():
    policy = IntervalPolicy(50)
    policy.step(1.0)
    assert [step for step in range(120) if policy.due(step, last_saved=0)] == [50, 100]
    assert not policy.due(50, last_saved=50)
    assert policy.due(100, last_saved=60)  # after a stop at 60


def trained(policy, start, steps, seconds, cost=0.0, carried_after=None):
    """Saves of a training with steps of `seconds`; each save pauses for `cost` and is through after some steps."""
    saves, last, begun = [], start, None
    for step in range(start + 1, start + steps + 1):
        policy.step(seconds, saving=begun is not None)
        if begun is not None and step - begun >= (carried_after or 1):
            policy.carried((step - begun) * seconds)
            begun = None
        if policy.due(step, last):
            saves.append(step)
            last = begun = step
            policy.saved(cost)
    return saves


def test_the_first_save_is_early_and_the_others_at_the_optimum():
    # 1 s a step, 2 s a save, the prior's one interruption a day: sqrt(2 * 2 * 86400) = 588
    saves = trained(IntervalPolicy("auto"), 0, 3000, 1.0, cost=2.0)
    assert saves[0] == FIRST
    assert all(580 <= later - earlier <= 610 for earlier, later in itertools.pairwise(saves))


def test_what_earlier_processes_know_is_used_from_the_first_step_on():
    # 25 interruptions in 4 days and the prior: 26 in 5 days; sqrt(2 * 0.5 * 86400 / 5.2) = 129
    known = History(unannounced=25, days=4.0, cost=0.5, carry=20.0)
    policy = IntervalPolicy("auto", history=known)
    saves = trained(policy, 1000, 600, 1.0, cost=0.5)
    assert saves[0] == pytest.approx(1129, abs=2)
    # a longer interval than five minutes waits for no first save
    policy = IntervalPolicy("auto", history=History(days=99.0, cost=0.5))
    assert trained(policy, 1000, 600, 1.0)[0] == 1000 + FIRST


def test_a_run_that_never_came_to_its_first_save_saves_early():
    # killed every four minutes, it would never get on with a first save after five
    policy = IntervalPolicy("auto", history=History(unannounced=3, days=0.01))
    assert trained(policy, 0, 240, 1.0)[0] == SHORTEST
    assert trained(IntervalPolicy("auto", history=History(unannounced=0)), 0, 400, 1.0)[0] == FIRST


def test_a_configured_rate_is_taken_at_its_word():
    policy = IntervalPolicy("auto", per_day=8.0, history=History(unannounced=99, days=1.0, cost=0.5))
    assert policy.per_day == 8.0
    policy.step(1.0)
    policy.step(1.0)
    assert policy.choice.seconds == pytest.approx(young(0.5, DAY / 8), rel=0.01)


def test_the_rate_falls_while_nothing_happens():
    policy = IntervalPolicy("auto")
    for _ in range(30):
        policy.step(DAY, steps=1000)
    assert policy.per_day == pytest.approx(1 / 31)


def test_cost_is_pause_and_slowdown():
    policy = IntervalPolicy("auto")
    policy.step(60.0)  # compiles
    policy.step(10.0, steps=10)
    assert policy.step_seconds == 1.0
    policy.saved(0.25)
    policy.step(11.0, saving=True, steps=10)  # 1 s more than ten quiet steps
    assert policy.cost is None
    policy.carried(11.0)
    assert policy.cost == pytest.approx(1.25)
    assert policy.carry == 11.0


def test_steps_that_were_faster_beside_a_save_do_not_make_it_cheaper_than_its_pause():
    policy = IntervalPolicy("auto")
    policy.step(1.0)
    policy.step(1.0)
    policy.saved(0.5)
    policy.step(0.1, saving=True)
    policy.carried(0.1)
    assert policy.cost == 0.5


def test_without_a_quiet_step_only_the_pause_counts():
    policy = IntervalPolicy("auto")
    policy.step(1.0, saving=True)
    policy.saved(0.5)
    policy.step(1.0, saving=True)
    policy.carried(1.0)
    assert policy.cost == 0.5


def test_a_save_that_never_gets_through_is_measured_by_the_next():
    policy = IntervalPolicy("auto")
    policy.step(1.0)
    policy.step(1.0)
    for _ in range(3):
        policy.saved(0.5)
        policy.step(1.5, saving=True)
    assert policy.cost == pytest.approx(1.0)
    assert policy.carry is None


def test_one_hiccup_changes_nothing():
    policy = IntervalPolicy("auto")
    policy.step(1.0)
    policy.step(1.0)
    for slow in (0.0, 0.0, 100.0, 0.0, 0.0):
        policy.saved(0.5)
        policy.step(1.0 + slow, saving=True)
        policy.carried(1.0)
    assert policy.cost == 0.5


def test_only_a_change_that_matters_is_taken_up_and_logged(caplog):
    caplog.set_level(logging.INFO, "wmtp_worker")
    policy = IntervalPolicy("auto", per_day=1.0, history=History(cost=0.5))
    random.seed(1)
    for _ in range(500):
        policy.step(1.0 + random.uniform(-0.3, 0.3))
        assert policy.choice is None or policy.choice.steps == pytest.approx(294, rel=0.2)
    assert len(caplog.messages) <= 2
    caplog.clear()
    for _ in range(200):
        policy.step(4.0)
        policy.due(1, 0)
    assert policy.choice.steps == pytest.approx(294 / 4, rel=0.25)
    assert caplog.messages[-1].startswith(f"saving every {policy.choice.steps} steps of ")
    assert len(caplog.messages) <= 8


def test_asking_changes_no_answer():
    policy = IntervalPolicy("auto", history=History(cost=0.5))
    assert not policy.due(1000, 0)  # no step measured yet
    policy.step(1.0)
    policy.step(1.0)
    assert [policy.due(250, 0) for _ in range(3)] == [False] * 3
    assert [policy.due(294, 0) for _ in range(3)] == [True] * 3


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0004, "0.4 ms"), (0.5, "0.5 s"), (119.0, "119.0 s"), (120, "2.0 min"), (DAY, "24.0 h"), (2 * DAY, "2.0 d")],
)
def test_times_are_spelled_for_people(seconds, text):
    assert spell(seconds) == text
