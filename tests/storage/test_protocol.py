"""Model check of lease, publish and retention: two workers, crashes, stalls, lost answers and writes that come late.

`WMTP_PROTOCOL_EXAMPLES=5000` looks further than the few that every test run tries.
"""

import contextlib
import os
import re
import shutil

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.storage.protocol import KEEP_LAST, Worker, World, new_workdir, write_checkpoint

EXAMPLES = int(os.environ.get("WMTP_PROTOCOL_EXAMPLES", "0"))
WORKERS = st.sampled_from([0, 1])
CALLS = st.integers(1, 12)
# of clocks: one that stands still is that of a machine that was frozen
RATES = (0.0, 0.8, 1.0, 1.25)
POINTS = (
    "put .*/step_.*/manifest.json",
    "head .*/step_.*/manifest.json",
    "delete .*/step_.*/manifest.json",
    "put .*/lease.json",
    "(put|copy) .*/(step_[0-9]+|shared)/(?!manifest)",
    "delete .*/(step_[0-9]+|shared)/(?!manifest)",
    "list .*/step_",
)


class Protocol(RuleBasedStateMachine):
    """Two places where a worker may run; what happens there, in any order."""

    @initialize(rates=st.tuples(*[st.sampled_from(RATES)] * 2), conditional_delete=st.booleans())
    def begin(self, rates, conditional_delete):
        self.world = World(conditional_delete)
        self.rates = rates
        self.workdirs = [new_workdir(), new_workdir()]
        self.workers = [None, None]
        self.lives = 0
        self.went_back = 0  # lives begun when a run last went back: older disks know of another history

    def alive(self, number):
        return self.workers[number] is not None and self.workers[number].alive

    @rule(number=WORKERS, wipe=st.booleans(), back=st.integers(0, 9), calls=CALLS)
    def start(self, number, wipe, back, calls):
        if self.alive(number) or self.lives > 40:
            return
        if wipe or back == 0 or self.must_wipe(number):
            shutil.rmtree(self.workdirs[number])
            self.workdirs[number] = new_workdir()
        self.lives += 1
        if back == 0:
            self.went_back = self.lives
        goal = max((step for step, _ in self.world.safe.items()), default=0) + 4
        name = f"life {self.lives} of {number}"
        worker = Worker(self.world, self.workdirs[number], name, self.rates[number], back == 0, goal)
        worker.life = self.lives
        self.workers[number] = worker
        self.go(number, calls)

    def must_wipe(self, number):
        before = self.workers[number]
        return before is not None and before.life < self.went_back

    @rule(number=WORKERS, calls=CALLS)
    def go(self, number, calls):
        for _ in range(calls):
            if self.alive(number):
                self.workers[number].step()
                self.world.check()

    @rule(number=WORKERS, calls=st.integers(20, 200))
    def go_far(self, number, calls):
        self.go(number, calls)

    @rule(number=WORKERS, point=st.sampled_from(POINTS), times=st.integers(1, 2))
    def go_to(self, number, point, times):
        """Stop right before a call on which much depends."""
        for _ in range(times):
            self.go(number, 1)
            for _ in range(300):
                if not self.alive(number) or re.match(point, self.workers[number].next):
                    break
                self.go(number, 1)

    @rule(number=WORKERS, wipe=st.booleans(), back=st.integers(0, 9))
    def take_over(self, number, wipe, back):
        """Another worker finds that the lease has run out, and decides where it goes on."""
        self.world.now += 10
        if self.alive(number):
            self.crash(number, "die before")
        self.start(number, wipe, back, 1)
        for _ in range(100):
            if not self.alive(number) or self.workers[number].epoch in self.world.began:
                break
            self.go(number, 1)

    @rule(
        number=WORKERS,
        point=st.sampled_from(POINTS),
        times=st.integers(1, 2),
        wipe=st.booleans(),
        back=st.integers(0, 3),
        others_back=st.integers(0, 3),
        others_calls=st.one_of(st.integers(0, 12), st.integers(0, 80)),
        other_dies=st.booleans(),
        calls=st.integers(1, 3),
    )
    def stall(self, number, point, times, wipe, back, others_back, others_calls, other_dies, calls):
        """One is paused right before such a call, another takes over and perhaps dies, the first one wakes up."""
        if back == 0:
            self.world.now += 10
            self.crash(number, "die before")
            self.start(number, wipe, 0, 1)
        elif not self.alive(number) or self.workers[number].epoch < self.world.newest_epoch:
            self.take_over(number, wipe, 9)
        self.go_to(number, point, times)
        other = 1 - number
        self.take_over(other, wipe, others_back)
        self.go(other, others_calls)
        if other_dies:
            self.crash(other, "die before")
        self.go(number, calls)
        if other_dies:
            self.take_over(other, True, 9)

    @rule(first=WORKERS, calls=st.integers(1, 80))
    def race(self, first, calls):
        """Two find a free lease at the same time."""
        for number in (0, 1):
            if self.alive(number):
                self.crash(number, "die after")
        self.world.now += 10
        for number in (0, 1):
            self.start(number, False, 9, 0)
            self.go_to(number, "put .*/lease.json", 1)
        self.go(first, calls)
        self.go(1 - first, calls)
        self.go(first, 60)

    @rule(number=WORKERS, how=st.sampled_from(["fail", "lost"]), times=st.integers(1, 3))
    def trouble(self, number, how, times):
        for _ in range(times):
            if self.alive(number):
                self.workers[number].step(how)

    @rule(number=WORKERS, how=st.sampled_from(["die before", "die after", "die in flight"]))
    def crash(self, number, how):
        if self.alive(number):
            self.workers[number].step(how)

    @rule(seconds=st.integers(1, 8))
    def pass_time(self, seconds):
        self.world.now += seconds

    @precondition(lambda self: self.world.in_flight)
    @rule(which=st.integers(0, 3))
    def land(self, which):
        operation = self.world.in_flight.pop(which % len(self.world.in_flight))
        with contextlib.suppress(Exception):  # nobody is there to hear of it
            operation()

    @invariant()
    def holds(self):
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self):
        if not hasattr(self, "world"):
            return
        try:
            for worker in self.workers:
                if worker is not None:
                    worker.kill()
            self.world.now += 100
            if not self.world.broken:
                self.last_life()
        finally:
            for workdir in self.workdirs:
                shutil.rmtree(workdir, ignore_errors=True)

    def last_life(self):
        """A worker with nobody else about goes on from what is there, and leaves no garbage."""
        workdir = new_workdir()
        self.workdirs.append(workdir)
        # what a run went back behind, and did not come to move, is replaced
        goal = max([*self.world.safe, *self.world.view().manifests], default=0) + KEEP_LAST + 2
        worker = Worker(self.world, workdir, "last life", 1.0, False, goal)
        for _ in range(3000):
            if not worker.alive:
                break
            worker.step()
        assert worker.result == "finished", worker.result
        self.world.check()
        view = self.world.view()
        assert sorted(view.manifests) == [goal - 1, goal]
        assert set(view.places) == view.named()
        assert not list(self.world.bucket.list(view.keys.probes))


@pytest.fixture
def calls_one_by_one(monkeypatch):
    """One call of a worker at a time, and no waiting for disks."""
    monkeypatch.setattr("wmtp_worker.storage.sealed._FILES_AT_ONCE", 1)
    for module in ("atomic", "sealed"):
        monkeypatch.setattr(f"wmtp_worker.storage.{module}.fsync_path", lambda path: None)
    monkeypatch.setattr("wmtp_worker.storage.lease.log.disabled", True)


def until(worker, point):
    for _ in range(300):
        if not worker.alive or re.match(point, worker.next):
            return
        worker.step()


@pytest.fixture(params=[True, False], ids=["conditional delete", "delete ignores versions"])
def world(request):
    return World(request.param)


@pytest.fixture
def life(calls_one_by_one, world, tmp_path):
    workers = []

    def begin(name, back=False):
        worker = Worker(world, tmp_path / name, name, 1.0, back, 4)
        workers.append(worker)
        return worker

    yield begin
    for worker in workers:
        worker.kill()


def test_a_paused_worker_does_not_write_over_a_newer_ones_manifest(world, life):
    manifest = "put .*/step_2/manifest.json"
    first = life("first")
    until(first, manifest)
    world.now += 10
    second = life("second")
    until(second, "put .*/step_3/")
    assert world.safe == {1: 2, 2: 2}
    until(first, "nothing")
    assert first.result == "held"
    world.check()
    assert world.view().manifests[2].epoch == 2


def test_a_paused_worker_does_not_delete_what_a_run_went_back_to(world, life):
    first = life("first")
    last_chance = "delete" if world.bucket.conditional_delete else "head"
    until(first, f"{last_chance} .*/step_1/manifest.json")
    world.now += 10
    second = life("second", back=True)
    until(second, "put .*/step_2/")
    assert world.began == {1: 0, 2: 1}
    until(first, "nothing")
    world.check()
    assert [(step, one.owner) for step, one in world.view().manifests.items()] == [(1, 2)]


def test_a_paused_worker_does_not_delete_where_one_that_died_went_back_to(world, life):
    first = life("first")
    until(first, "head .*/step_1/manifest.json")
    world.now += 10
    second = life("second", back=True)
    while 2 not in world.began:
        second.step()
    second.kill()
    until(first, "nothing")
    assert first.result == "held"
    world.check()
    assert max(step for step in world.view().steps) == 1


def test_a_paused_worker_that_went_back_does_not_delete_what_another_goes_on_from(world, life):
    until(life("before"), "nothing")
    first = life("first", back=True)
    until(first, "head .*/step_4/manifest.json")
    assert sorted(world.view().manifests) == [3, 4]
    world.now += 10
    second = life("second")
    until(second, "nothing")
    assert world.began == {1: 0, 2: 3, 3: 3}
    until(first, "nothing")
    assert first.result == "held"
    world.check()
    assert [(step, one.owner) for step, one in world.view().manifests.items()] == [(3, 3), (4, 3)]


def test_a_paused_worker_does_not_replace_what_another_goes_on_from(world, life):
    before = life("before")
    until(before, "put .*/step_2/manifest.json")
    before.kill()
    world.now += 10
    first = life("first")
    write_checkpoint(first.paths, 1, "another branch, on this disk")
    until(first, "put .*/step_1/manifest.json")
    world.now += 10
    second = life("second")
    until(second, "put .*/step_2/")  # and what the first one sent is swept
    assert world.safe == {1: 3}
    first.step()
    world.check()
    until(first, "nothing")
    assert first.result == "held"
    world.check()
    assert world.view().whole(1)


def test_a_paused_worker_that_went_back_leaves_the_older_checkpoint_as_it_was(world, life):
    until(life("before"), "nothing")
    first = life("first", back=True)
    until(first, "put .*/step_3/manifest.json")
    world.now += 10
    until(life("second"), "nothing")
    assert world.began == {1: 0, 3: 4}  # and what the first one sent is swept
    until(first, "nothing")
    assert first.result == "held"
    world.check()
    view = world.view()
    assert view.manifests[3].epoch == 1
    assert view.whole(3)


def test_what_a_paused_worker_writes_late_is_not_gone_on_from(world, life):
    manifest = "put .*/step_2/manifest.json"
    first = life("first")
    until(first, manifest)
    world.now += 10
    second = life("second")
    until(second, manifest)
    assert world.began == {1: 0, 2: 1}
    second.kill()
    first.step()  # the manifest of step 2, long after it looked at its lease
    assert world.view().manifests[2].epoch == 1
    until(first, "nothing")
    assert first.result == "held"
    world.now += 10
    third = life("third")
    until(third, manifest)
    assert world.began[3] == 1
    until(third, "nothing")
    world.check()
    assert [(step, one.epoch) for step, one in world.view().manifests.items()] == [(3, 3), (4, 3)]


def test_the_protocol(calls_one_by_one):
    run_state_machine_as_test(
        Protocol,
        settings=settings(
            max_examples=EXAMPLES or 60,
            stateful_step_count=25,
            derandomize=not EXAMPLES,
            deadline=None,
            database=None,
            # what happened is told whole; to make it shorter takes minutes
            phases=(Phase.generate,),
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )
