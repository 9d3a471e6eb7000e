"""What interruptions cost, against accounts made by hand."""

import random

import pytest

from wmtp_worker.checkpoint.interval import History
from wmtp_worker.checkpoint.ledger import End, Reached, Running, Save, Start
from wmtp_worker.checkpoint.losses import Losses, summarise

HOUR = 3600.0


def start(process, at, *, reached=0, seen=None, seconds=None, gpus=8, price=36.0, resume="auto", phases=None):
    return Start(
        process=process,
        time=at,
        host=f"host-{process}",
        pid=1,
        gpus=gpus,
        price_per_hour=price,
        resume=resume,
        reached=Reached(step=reached, time=seen, seconds_per_step=seconds),
        phases=phases or {},
    )


def running(process, at, resumed_from, **phases):
    return Running(process=process, time=at, resumed_from=resumed_from, phases=phases)


def save(process, at, step, pause=1.0, cost=None, carry=None, seconds=2.0):
    return Save(process=process, time=at, step=step, pause=pause, cost=cost, carry=carry, seconds_per_step=seconds)


def end(process, at, how, step):
    return End(process=process, time=at, how=how, step=step)


# killed at step 437 after a save at 400, 2 s a step; 100 s later another machine takes over: 30 + 50 + 22 s to start
KILLED = [
    start("a", 0.0),
    running("a", 10.0, None, boot=5.0, first_step=7.0),
    save("a", 800.0, 400),
    start("b", 1000.0, reached=437, seen=880.0, seconds=2.1, phases={"boot": 20.0}),
    running("b", 1082.0, 400, boot=20.0, fetch=60.0, first_step=22.0),
]


def test_nothing_is_lost_where_nothing_happened():
    assert summarise([]) == Losses()
    losses = summarise([start("a", 0.0), running("a", 1.0, None), end("a", HOUR, "finished", 100)])
    assert (losses.interruptions, losses.gpu_seconds, losses.days, losses.money) == ([], 0.0, HOUR / 86400, 0.0)
    assert losses.sentence() == (
        "no interruptions in 60.0 min of running, no steps done again; "
        "lost GPU time: 0 s (0 s of work, 0 s in restarts, 0 s in no saves), 0.00 in money"
    )


def test_a_kill_by_hand():
    losses = summarise(KILLED)
    (item,) = losses.interruptions
    assert (item.how, item.reached, item.resumed_from, item.steps) == ("killed", 437, 400, 37)
    assert item.host == "host-b"
    assert item.work_seconds == 37 * 2.0  # as its saves measured, not as the metrics
    # the first step's own 2.1 s are work: what it took longer is not; b has measured none, so all of it counts
    assert item.restart == {"boot": 20.0, "fetch": 60.0, "first_step": 22.0}
    assert item.away == 1000.0 - 20.0 - 880.0
    assert item.gpu_seconds == 8 * (74.0 + 102.0)
    assert item.money == pytest.approx((74.0 + 102.0) * 36.0 / HOUR)
    assert losses.work_gpu_seconds == 8 * 74.0
    assert losses.restart_gpu_seconds == 8 * 102.0
    assert (losses.saves, losses.pause_seconds, losses.save_gpu_seconds) == (1, 1.0, 8.0)
    assert losses.gpu_seconds == 8 * 177.0
    assert losses.money == pytest.approx(177.0 * 36.0 / HOUR)  # the pause of the save too
    # a lived 880 s, b 20 + 82
    assert losses.days == pytest.approx((880.0 + 102.0) / 86400)
    assert losses.per_day == pytest.approx(86400 / 982.0)


def test_the_first_step_itself_is_no_loss():
    losses = summarise([*KILLED, save("b", 1500.0, 600, seconds=2.0)])
    assert losses.interruptions[0].restart["first_step"] == 20.0


def test_machines_differ():
    events = [
        start("a", 0.0, gpus=8, price=36.0),
        running("a", 10.0, None),
        save("a", 100.0, 10, pause=0.0, seconds=10.0),
        start("b", 200.0, reached=15, gpus=2, price=9.0),
        running("b", 300.0, 10, boot=100.0),
    ]
    losses = summarise(events)
    assert losses.work_gpu_seconds == 5 * 10.0 * 8
    assert losses.restart_gpu_seconds == 100.0 * 2
    assert losses.money == pytest.approx((50.0 * 36.0 + 100.0 * 9.0) / HOUR)


def test_a_notice_costs_only_the_restart():
    events = [
        start("a", 0.0),
        running("a", 10.0, None),
        save("a", 500.0, 250),
        end("a", 501.0, "notice", 250),
        start("b", 600.0, reached=250),
        running("b", 650.0, 250, setup=50.0),
    ]
    losses = summarise(events)
    (item,) = losses.interruptions
    assert (item.how, item.steps, item.work_seconds, item.restart_seconds) == ("notice", 0, 0.0, 50.0)
    assert item.away == 99.0
    assert losses.history.unannounced == 0


def test_a_notice_whose_save_was_lost_costs_work_and_counts():
    events = [
        start("a", 0.0),
        running("a", 10.0, None),
        end("a", 501.0, "notice", 250),
        start("b", 600.0, reached=250, seconds=2.0),
        running("b", 650.0, 200),
    ]
    losses = summarise(events)
    assert losses.interruptions[0].steps == 50
    assert losses.work_gpu_seconds == 50 * 2.0 * 8
    assert losses.history.unannounced == 1


def test_killed_before_the_first_save_begins_anew():
    events = [
        start("a", 0.0),
        running("a", 10.0, None),
        start("b", 100.0, reached=40, seconds=2.0),
        running("b", 110.0, None),
    ]
    (item,) = summarise(events).interruptions
    assert (item.steps, item.resumed_from, item.work_seconds) == (40, None, 80.0)


def test_a_process_killed_while_it_starts_loses_its_start_and_the_work_is_counted_once():
    events = [
        *KILLED[:3],
        start("b", 1000.0, reached=437, seen=880.0, phases={"boot": 20.0}),
        # killed 40 s later; its heartbeat told no step
        start("c", 1100.0, reached=437, seen=1040.0),
        running("c", 1150.0, 400, setup=50.0),
    ]
    first, second = summarise(events).interruptions
    assert (first.steps, first.restart) == (0, {"boot": 20.0, "unfinished": 40.0})
    assert (second.steps, second.restart) == (37, {"setup": 50.0})
    assert summarise(events).work_gpu_seconds == 37 * 2.0 * 8


def test_twice_from_the_same_checkpoint():
    events = [
        *KILLED,
        start("c", 2000.0, reached=420, seen=1200.0),
        running("c", 2050.0, 400),
    ]
    assert [item.steps for item in summarise(events).interruptions] == [37, 20]


def test_what_somebody_decided_is_no_loss():
    for resume in ("never", 100):
        events = [*KILLED[:3], start("b", 1000.0, reached=437, resume=resume), running("b", 1050.0, 100)]
        assert summarise(events).interruptions == []
    finished = [*KILLED[:3], end("a", 900.0, "finished", 437), start("b", 1000.0, reached=437), running("b", 1, 437)]
    assert summarise(finished).interruptions == []


def test_without_a_price_there_is_no_money():
    events = [
        event.model_copy(update={"price_per_hour": None}) if event.event == "start" else event for event in KILLED
    ]
    losses = summarise(events)
    assert (losses.money, losses.interruptions[0].money) == (None, None)
    assert "money" not in losses.sentence()
    assert "losses/money" not in losses.metrics()


def test_a_running_process_lives_until_now():
    assert summarise(KILLED, now=1000.0 + 86400).days == pytest.approx((880.0 + 20.0 + 86400) / 86400)
    ended = [*KILLED, end("b", 2000.0, "finished", 500)]
    assert summarise(ended, now=1e9).days == summarise(ended).days


def test_lines_of_a_process_whose_start_is_missing_are_left_out():
    assert summarise([running("x", 1.0, None), save("x", 2.0, 5)]) == Losses()


def test_what_the_next_process_needs_to_choose_an_interval():
    events = [*KILLED, save("b", 1500.0, 600, cost=0.7, carry=30.0), save("b", 1800.0, 700)]
    days = (880.0 + 20.0 + 800.0) / 86400
    assert summarise(events).history == History(1, pytest.approx(days), 0.7, 30.0)


def test_the_line_and_the_numbers():
    losses = summarise(KILLED)
    assert losses.sentence() == (
        "1 interruption in 16.4 min of running, 37 steps done again; lost GPU time: 23.6 min "
        "(9.9 min of work, 13.6 min in restarts, 8.0 s in 1 save), 1.77 in money"
    )
    numbers = losses.metrics()
    assert numbers["losses/steps"] == 37.0
    assert numbers["losses/gpu_seconds"] == 8 * 177.0
    assert all(isinstance(value, float) for value in numbers.values())
    document = losses.to_json()
    assert document["interruptions"][0]["restart"]["fetch"] == 60.0
    assert document["steps"] == 37


def any_line(rng):
    process, at, step = rng.choice("abcd"), rng.uniform(5, 1000), rng.randrange(500)
    return rng.choice(
        [
            start(process, at, reached=step, seen=rng.choice([None, at - 5]), seconds=rng.choice([None, 2.0])),
            running(process, at, rng.choice([None, step]), boot=rng.uniform(0, 50), first_step=1.0),
            save(process, at, step),
            end(process, at, rng.choice(["finished", "notice", "failed"]), step),
        ]
    )


def test_any_order_of_lines_has_an_account_that_adds_up():
    rng = random.Random(0)
    for _ in range(1000):
        losses = summarise([any_line(rng) for _ in range(rng.randrange(30))], now=rng.choice([None, 1000.0]))
        parts = sum(item.gpu_seconds for item in losses.interruptions) + losses.save_gpu_seconds
        assert losses.gpu_seconds == pytest.approx(parts)
        assert min([losses.days, *losses.metrics().values()]) >= 0
        for item in losses.interruptions:
            assert min([item.steps, item.restart_seconds, item.gpu_seconds, item.away]) >= 0
        assert losses.sentence()
