"""The simulated fleet: its book-keeping by hand, and that what it shows holds on a small scale."""

import random
from dataclasses import replace

import pytest

from benchmarks.fleet import POLICIES, TRACES, Interruption, Machine, Policy, compare, simulate, trace

# 1 s a step, 10 s to save blocking, 20 s to upload, 30 s to start again
SMALL = Machine(
    step=1.0, state=1e9, trainable=1e9, torch_save=1e8, write=1e9, upload=5e7, download=1e8, boot=20.0, slowdown=0.0
)
HOURLY, TEN_MINUTES, FIXED, AUTO, GCP, EC2 = POLICIES
DAYS = 10.0


def test_an_undisturbed_run_wastes_its_saves():
    waste = simulate(SMALL, Policy("", False, 100.0), [], days=1100 / 86400)
    assert (waste.paused, waste.useful, waste.wasted) == pytest.approx((100.0, 1000.0, 100.0))
    assert waste.saves == 10


def test_one_interruption_by_hand():
    # 100 steps and a pause of 10 s in turn: at 500 s step 460 is done; the save of step 400, begun at 430, was written
    # at 440 and is uploaded at 460; 30 s later the next machine goes on from there and saves at 630 and 740
    waste = simulate(SMALL, Policy("", False, 100.0), [Interruption(500.0, False)], days=800 / 86400)
    assert waste.lost == pytest.approx(60.0)
    assert waste.restarted == pytest.approx(30.0)
    assert waste.paused == pytest.approx(60.0)
    assert waste.useful == pytest.approx(650.0)


def test_what_is_not_uploaded_yet_is_lost_with_the_machine():
    # at 455 s the save of step 400 is still on its way
    waste = simulate(SMALL, Policy("", False, 100.0), [Interruption(455.0, False)], days=800 / 86400)
    assert waste.lost == pytest.approx(415.0 - 300.0)


def test_steps_beside_a_save_are_slower():
    slow = replace(SMALL, slowdown=0.25, pause=0.0)
    # 21 s to write and upload, in which 16.8 steps are done: 80 steps take 80 s, then 84.2 s each time
    waste = simulate(slow, Policy("", True, 80.0), [], days=(80 + 9 * 84.2) / 86400)
    assert (waste.slowed, waste.useful) == pytest.approx((9 * 4.2, 800.0))


def test_a_notice_that_is_long_enough_rescues_everything():
    gone = [Interruption(500.0, True)]
    heeded = simulate(SMALL, Policy("", True, 3600.0, notice=60.0), gone, days=800 / 86400)
    assert (heeded.lost, heeded.restarted) == pytest.approx((0.0, 60.0 + 30.0))
    # 2 + 1.5 * (1 + 20) s are needed
    short = simulate(SMALL, Policy("", True, 3600.0, notice=30.0), gone, days=800 / 86400)
    assert short.lost == pytest.approx(470.0)
    unheeded = simulate(SMALL, Policy("", True, 3600.0), gone, days=800 / 86400)
    assert unheeded.lost == pytest.approx(500.0)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
@pytest.mark.parametrize("kind", TRACES)
def test_every_second_is_counted_once(kind, policy):
    waste = simulate(Machine(), policy, trace(kind, 8.0, 3.0, seed=1, announced=0.5), 3.0)
    assert waste.useful + waste.wasted == pytest.approx(3 * 86400, abs=0.1)
    assert min(waste.paused, waste.slowed, waste.lost, waste.restarted, waste.useful) >= 0


@pytest.mark.parametrize("kind", TRACES)
def test_traces_have_their_rate_and_are_the_same_every_time(kind):
    items = trace(kind, 2.0, 400.0, seed=3, announced=0.9)
    assert len(items) == pytest.approx(800, rel=0.15)
    assert sum(item.announced for item in items) == pytest.approx(0.9 * len(items), rel=0.05)
    assert items == sorted(items, key=lambda item: item.at)
    random.seed(99)
    assert items == trace(kind, 2.0, 400.0, seed=3, announced=0.9)


def traces(per_day):
    return [trace("Poisson", per_day, DAYS, seed, 0.9) for seed in range(3)]


@pytest.mark.parametrize("per_day", [0.5, 2.0, 8.0])
def test_auto_wastes_about_as_little_as_the_best_fixed_interval(per_day):
    def share(policy):
        return compare(Machine(), policy, traces(per_day), DAYS)["share"]

    best = min(share(Policy("", True, every)) for every in (300.0, 450.0, 600.0, 900.0, 1200.0, 1800.0, 3600.0))
    assert share(AUTO) <= 1.15 * best
    assert share(AUTO) < min(share(HOURLY), share(TEN_MINUTES))


def test_a_notice_is_worth_something_once_a_checkpoint_fits_into_it():
    def lost(policy, upload):
        result = compare(replace(Machine(), upload=upload), policy, traces(4.0), DAYS)
        return result["mean gpu hours by part"]["lost"]

    assert lost(EC2, 3e9) < 0.5 * lost(AUTO, 3e9)
    assert lost(GCP, 3e9) > 0.8 * lost(AUTO, 3e9)
