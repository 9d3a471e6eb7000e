"""The lease: one holder at a time on every kind of bucket, taken over when it should be, lost for good."""

import json
import logging
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.storage.memory import MemoryStore
from wmtp_worker.errors import (
    CheckpointError,
    ExhaustedError,
    PreconditionFailed,
    RunHeldError,
    SettingsError,
    TransientError,
)
from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.storage.lease import Lease
from wmtp_worker.storage.lease_file import LeaseFile, counts, read_lease, workdir_id
from wmtp_worker.storage.retry import RetryingStore
from wmtp_worker.storage.seldom import Seldom

KEYS = RunPaths(Path(), "tiny").keys


class Time:
    """A clock that only sleeping moves."""

    def __init__(self):
        self.now = 100.0

    def clock(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def time_():
    return Time()


@pytest.fixture
def bucket(time_):
    return MemoryStore(time_.clock)


@pytest.fixture
def acquire(bucket, time_):
    def take(store=bucket, **options):
        terms = {"seconds": 30, "clock": time_.clock, "sleep": time_.sleep, **options}
        return Lease.acquire(store, KEYS, **terms)

    return take


def file_of(bucket) -> LeaseFile:
    return read_lease(bucket, KEYS.lease).file


def test_of_sixteen_one_gets_it(store, again):
    stores = [RetryingStore(again(), 60) for _ in range(4)]

    def attempt(number):
        lease = Lease.acquire(stores[number % 4], KEYS, seconds=9)
        lease.start()
        return lease

    with ThreadPoolExecutor(16) as pool:
        results = [pool.submit(attempt, number) for number in range(16)]
    errors = [result.exception() for result in results]
    winners = [result.result() for result, error in zip(results, errors, strict=True) if error is None]
    assert [type(error) for error in errors if error is not None] == [RunHeldError] * 15
    (winner,) = winners
    assert file_of(store).holder.nonce == winner._holder.nonce
    assert winner.epoch == 1
    winner.release()
    assert winner.close()
    following = Lease.acquire(stores[0], KEYS, seconds=3)
    assert following.epoch == 2
    with pytest.raises(RunHeldError):
        winner.renew()
    # nothing but the lease is left of all that
    assert [info.key for info in store.list()] == [KEYS.lease]


def test_the_error_names_the_holder(acquire, bucket, time_):
    holder = acquire()

    def sleep(seconds):
        time_.sleep(seconds)
        holder.renew()

    before = time_.now
    with pytest.raises(RunHeldError, match=rf"{holder._holder.host} \(epoch 1\)") as caught:
        acquire(wait=20, sleep=sleep)
    assert caught.value.exit_code == 79
    assert 20 <= time_.now - before < 25
    assert file_of(bucket).epoch == 1


def test_a_released_lease_is_free_at_once(acquire, time_):
    acquire().release()
    before = time_.now
    assert acquire().epoch == 2
    assert time_.now == before


def test_a_lease_of_the_same_work_directory_is_free_at_once(acquire, time_):
    first, before = acquire(workdir_id="w"), time_.now
    assert acquire(workdir_id="w").epoch == 2
    assert time_.now == before
    with pytest.raises(RunHeldError, match="taken over"):
        first.ensure(fresh=True)


def test_one_of_the_same_work_directory_on_another_host_is_watched(acquire, time_, monkeypatch):
    acquire(workdir_id="w")
    monkeypatch.setattr("wmtp_worker.storage.lease_file.socket.gethostname", lambda: "a-clone")
    before = time_.now
    assert acquire(workdir_id="w").epoch == 2
    assert time_.now - before >= 30


def test_one_that_ran_out_by_the_servers_clock_is_free_at_once(acquire, bucket, time_):
    acquire()
    time_.now += 33
    before = time_.now
    assert acquire().epoch == 2
    assert time_.now == before
    assert [info.key for info in bucket.list()] == [KEYS.lease]


def test_one_that_is_not_renewed_is_watched_until_it_runs_out(acquire, bucket, time_):
    acquire()
    bucket._now = lambda: 0  # a server that does not tell the time
    before = time_.now
    assert acquire().epoch == 2
    assert 30 <= time_.now - before < 34


def test_a_slow_answer_about_the_time_makes_no_lease_shorter(acquire, bucket, time_, monkeypatch):
    acquire()
    before, put = time_.now, bucket.put

    def slow(key, *arguments, **options):
        if key.startswith(KEYS.probes):
            time_.now += 20
        return put(key, *arguments, **options)

    monkeypatch.setattr(bucket, "put", slow)
    assert acquire().epoch == 2
    assert time_.now - before >= 32


def test_a_server_that_refuses_every_write_is_not_asked_for_ever(acquire, bucket, time_, monkeypatch):
    acquire().release()
    before, calls = time_.now, []

    def refuse(*arguments, **options):
        calls.append(arguments)
        raise PreconditionFailed("another ETag")

    monkeypatch.setattr(bucket, "put", refuse)
    with pytest.raises(TransientError, match="refuses to change the lease"):
        acquire()
    assert len(calls) == 5
    assert time_.now - before >= 6


def test_who_was_stopped_longer_than_the_lease_knows_before_it_publishes(acquire, time_):
    first = acquire()
    first.began(0)
    time_.now += 100
    second = acquire()
    second.began(10)
    first.check()  # it has not asked yet
    with pytest.raises(RunHeldError, match=r"taken over by pid .* .epoch 2.: epoch 1 may publish nothing"):
        first.ensure()
    with pytest.raises(RunHeldError):
        first.check()
    assert first.lost
    second.ensure(fresh=True)
    assert second.epochs == ((1, 0), (2, 10))


def test_who_was_stopped_and_not_missed_goes_on(acquire, bucket, time_):
    lease = acquire()
    time_.now += 100
    lease.ensure()
    assert file_of(bucket).renewals == 1
    lease.ensure()
    assert file_of(bucket).renewals == 1


def test_a_bucket_that_is_away_is_no_loss(acquire, bucket, time_, monkeypatch):
    lease = acquire()
    put = bucket.put

    def away(*arguments, **options):
        raise TransientError("away")

    monkeypatch.setattr(bucket, "put", away)
    lease.ensure()
    time_.now += 100
    with pytest.raises(TransientError):
        lease.ensure()
    lease.check()
    lease.release()  # asks nothing of a bucket that is away
    monkeypatch.setattr(bucket, "put", put)
    lease.ensure()


def test_answers_that_were_lost(acquire, bucket, monkeypatch):
    lease = acquire()
    put = bucket.put

    def lost(*arguments, **options):
        put(*arguments, **options)
        raise ExhaustedError("the answer was lost, again and again")

    monkeypatch.setattr(bucket, "put", lost)
    with pytest.raises(ExhaustedError):
        lease.began(7)
    monkeypatch.setattr(bucket, "put", put)
    lease.renew()
    lease.began(7)
    assert file_of(bucket).epochs == ((1, 7),)


def test_a_lease_that_somebody_deleted_is_written_again(acquire, bucket):
    lease = acquire()
    bucket.delete(KEYS.lease)
    lease.renew()
    assert file_of(bucket).epoch == 1


def test_epochs_go_on_where_objects_tell_of_older_ones(acquire, bucket):
    bucket.put("checkpoints/tiny/step_10/e7/model.safetensors", b"x")
    bucket.put("checkpoints/tiny/shared/e8/x.safetensors", b"x")
    assert acquire().epoch == 9


def test_a_malformed_lease_is_nobodys(acquire, bucket, caplog):
    bucket.put(KEYS.lease, b"{}")
    assert acquire().epoch == 1
    assert "malformed" in caplog.text


def test_a_lease_of_a_newer_format_is_left_alone(acquire, bucket):
    bucket.put(KEYS.lease, json.dumps({"format_version": 2}).encode())
    with pytest.raises(CheckpointError, match="newer"):
        acquire()


def test_one_who_is_taken_over_by_a_newer_format_has_lost(acquire, bucket):
    lease = acquire()
    bucket.put(KEYS.lease, json.dumps({"format_version": 2}).encode())
    with pytest.raises(RunHeldError, match="taken over by another worker"):
        lease.ensure(fresh=True)
    assert lease.lost


def test_a_server_that_ignores_versions_in_deletions_is_named_and_used(acquire, bucket, caplog):
    bucket.conditional_delete = False
    assert acquire().epoch == 1
    assert "ignores versions in deletions" in caplog.text
    assert [info.key for info in bucket.list()] == [KEYS.lease]


def test_who_finds_its_probe_swept_by_the_first_one_blames_no_server(acquire, bucket, monkeypatch):
    put = bucket.put

    def overtaken(key, data, **conditions):
        if key.startswith(KEYS.probes) and conditions.get("if_absent") and bytes(data) == b"2":
            monkeypatch.setattr(bucket, "put", put)
            acquire().release()
            bucket.delete(key)
        return put(key, data, **conditions)

    monkeypatch.setattr(bucket, "put", overtaken)
    assert acquire().epoch == 2


def test_a_server_without_conditions_is_refused_with_the_way_out(acquire, bucket, monkeypatch):
    put = bucket.put
    monkeypatch.setattr(bucket, "put", lambda key, data, **conditions: put(key, data))
    with pytest.raises(SettingsError, match=r"checkpoint\.lease=false"):
        acquire()
    assert list(bucket.list()) == []


@pytest.mark.parametrize(
    ("step", "epoch", "expected"),
    [(40, 1, True), (50, 1, False), (50, 2, True), (60, 2, False), (60, 3, True), (0, 0, True), (10, 0, False)],
)
def test_what_counts(step, epoch, expected):
    assert counts(((1, 0), (2, 40), (3, 55)), step, epoch) is expected


def test_the_thread_renews_and_tells(bucket):
    bucket._now = time.time
    lease = Lease.acquire(RetryingStore(bucket, 1), KEYS, seconds=0.15)
    lease.start(lambda: {"step": 7, "loss": 0.5})
    deadline = time.monotonic() + 60
    while file_of(bucket).renewals < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    lease.release()
    assert lease.close()
    assert not [thread for thread in threading.enumerate() if thread.name in ("lease", "heartbeat")]
    assert file_of(bucket).released
    told = json.loads(bucket.get(KEYS.heartbeat)[1])
    assert (told["step"], told["loss"], told["epoch"]) == (7, 0.5, 1)
    assert abs(told["time"] - datetime.now(UTC).timestamp()) < 60


def test_the_next_renewal_is_soon_where_the_last_one_is_long_ago(acquire, time_):
    lease = acquire()
    assert lease._until_renewal == 10
    time_.now += 9
    assert lease._until_renewal == 2.5
    time_.now += 100  # an outage: not a third of a lease later
    assert lease._until_renewal == 2.5


@pytest.mark.parametrize("trouble", ["it hangs", "a bug"])
def test_trouble_with_the_heartbeat_delays_no_renewal(bucket, monkeypatch, trouble):
    bucket._now = time.time
    put, began, over = bucket.put, threading.Event(), threading.Event()

    def hanging(key, *arguments, **options):
        if key == KEYS.heartbeat and not over.is_set():
            began.set()
            if trouble == "a bug":
                raise KeyError("step")
            over.wait(60)
        return put(key, *arguments, **options)

    monkeypatch.setattr(bucket, "put", hanging)
    lease = Lease.acquire(bucket, KEYS, seconds=0.15)
    lease.start(lambda: {"step": 7})
    deadline = time.monotonic() + 60
    while file_of(bucket).renewals < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert began.is_set()
    assert file_of(bucket).renewals >= 3
    over.set()
    lease.release()
    assert lease.close()
    assert json.loads(bucket.get(KEYS.heartbeat)[1])["step"] == 7


def test_the_heartbeat_tells_the_end(acquire, bucket):
    lease = acquire()
    lease.start(lambda: {"phase": "train", "lag": 0})
    lease.release()
    assert lease.close()
    told = json.loads(bucket.get(KEYS.heartbeat)[1])
    assert (told["phase"], told["lag"]) == ("ended", 0)


def test_a_copy_of_a_work_directory_is_another(tmp_path):
    first = workdir_id(tmp_path / "work")
    assert workdir_id(tmp_path / "work") == first
    shutil.copytree(tmp_path / "work", tmp_path / "copy")
    assert workdir_id(tmp_path / "copy") != first
    (tmp_path / "work").rename(tmp_path / "moved")
    assert workdir_id(tmp_path / "moved") == first


def test_seldom_says_how_much_it_left_out(caplog, time_):
    seldom = Seldom(logging.getLogger("wmtp_worker.test"), clock=time_.clock)
    for number in range(5):
        seldom.warn("a", "away %d", number)
        seldom.warn("b", "gone %d", number)
    time_.now += 61
    seldom.warn("a", "away %d", 5)
    assert [record.getMessage() for record in caplog.records] == [
        "away 0",
        "gone 0",
        "away 5 (4 like this were left out)",
    ]
