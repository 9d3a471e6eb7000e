"""What `RunBucket` does before, beside and after the training, without any training: a folder is the bucket."""

import logging
import threading
import time

import pytest

from wmtp_worker.checkpoint.manifest import Manifest
from wmtp_worker.errors import AccessDenied, CheckpointError, ExhaustedError, Interrupted, RunHeldError
from wmtp_worker.host.stop import StopRequest
from wmtp_worker.settings import load
from wmtp_worker.storage import CloudSync
from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.storage.lease_file import Holder, LeaseFile, read_lease
from wmtp_worker.storage.runs import RunSync
from wmtp_worker.storage.seal import file_entry, seal_folder
from wmtp_worker.training import errands
from wmtp_worker.training.bucket import RunBucket

RUN = "tiny"


@pytest.fixture
def settings(tmp_path, tiny_settings):
    """`settings(name, resume)` of a run in the work directory `name`; all share one bucket."""
    (tmp_path / "disk").mkdir()
    bucket = ("cloud.provider=local", f"cloud.bucket={tmp_path}/disk/bucket", "cloud.patience=0.2")
    overrides = [*tiny_settings, *bucket, "training.max_steps=100"]

    def make(name="here", resume="auto", *more):
        options = {"run.name": RUN, "run.workdir": str(tmp_path / name), "run.resume": resume}
        return load(overrides=[*overrides, *more], options=options, environ={})

    return make


@pytest.fixture
def machine(settings):
    """`machine(name, resume)`: the `RunBucket` of a process there."""
    opened = []

    def make(name="here", resume="auto", *more, stop=None, tick=lambda: None):
        chosen = settings(name, resume, *more)
        stop = stop or StopRequest()
        paths = RunPaths(chosen.run.workdir, RUN)
        paths.checkpoints.mkdir(parents=True, exist_ok=True)
        paths.logs.mkdir(parents=True, exist_ok=True)
        bucket = RunBucket(chosen, paths, stop.check, tick)
        opened.append(bucket)
        return bucket

    yield make
    for bucket in opened:
        bucket.close(seconds=5)


@pytest.fixture
def onlooker(settings):
    cloud = CloudSync(settings().cloud, settings("onlooker").run.workdir)
    yield cloud
    cloud.close()


def checkpoint(bucket, step):
    folder = bucket._paths.step(step)
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text(f"weights {step}")
    files = {"model.safetensors": file_entry(folder / "model.safetensors")}
    texts = dict.fromkeys(("created", "settings_digest", "worker_version", "torch_version"), "")
    Manifest(step=step, run=RUN, files=files, **texts).write(folder)


def begin(bucket, step=0):
    """Everything up to the first step."""
    bucket.fetch()
    bucket.wait_for_checkpoint()
    bucket.restored(step)


def publish(bucket, *steps):
    """A whole process that saves these steps."""
    begin(bucket)
    for step in steps:
        checkpoint(bucket, step)
        bucket.saved(step)
        deadline = time.monotonic() + 60
        while bucket.unpublished and time.monotonic() < deadline:
            time.sleep(0.005)
    assert bucket.close() == {}


def lease_of(cloud):
    return read_lease(cloud.store, cloud.run(RUN).keys.lease).file


def keys(cloud, prefix=""):
    return [info.key for info in cloud.store.list(prefix)]


def test_another_runs_value_model_is_in_the_bucket_alone(machine, onlooker):
    onlooker.store.put("checkpoints/mine-value/final.pt", b"values")
    critic = ("weighting.family=critic", "weighting.critic.value=mine-value", "data.solutions=all")
    for _ in range(2):
        bucket = machine("new", "auto", *critic)
        begin(bucket)
        assert bucket.close() == {}
        assert RunPaths(bucket._paths.workdir, "mine-value").final.read_bytes() == b"values"
        onlooker.store.delete("checkpoints/mine-value/final.pt")  # what is here is not asked for again


def test_a_fresh_start_does_not_bury_what_the_bucket_has(machine, onlooker, tiny_run, tmp_path, caplog):
    first = machine("first")
    begin(first)
    # whole, as the store and the manifest tell, but no checkpoint that a run can go on from
    first._paths.step(7).mkdir(parents=True)
    (first._paths.step(7) / "model.safetensors").write_text("weights")
    seal_folder(first._paths.step(7))
    first.saved(7)
    assert first.close() == {}
    second = machine("second")
    second.fetch()
    second.wait_for_checkpoint()
    assert "passed over step_7" in caplog.text
    with pytest.raises(CheckpointError, match=r"step_7 in the bucket look whole.*--resume never") as caught:
        second.check_fresh_start()
    assert caught.value.exit_code == 78
    second.close()
    second._paths.final.write_text("of a run whose checkpoints are gone")
    with pytest.raises(CheckpointError, match="look whole"):
        tiny_run(tmp_path / "second", "cloud.provider=local", f"cloud.bucket={tmp_path}/disk/bucket")
    assert second._paths.final.exists()
    assert onlooker.run(RUN).published_steps() == [7]
    # on purpose
    begin(machine("third", "never"))
    assert onlooker.run(RUN).published_steps() == []
    assert any("/step_7/" in key for key in keys(onlooker, f"checkpoints/{RUN}/set-aside-"))


def test_a_fresh_start_where_there_is_nothing(machine):
    bucket = machine()
    begin(bucket)
    bucket.check_fresh_start()


def test_a_bucket_that_goes_away_before_a_fresh_start_is_not_replaced(machine, onlooker, monkeypatch):
    publish(machine("first"), 7)
    second = machine("second")
    second.fetch()
    second.wait_for_checkpoint()
    with monkeypatch.context() as patch:
        patch.setattr(RunSync, "whole_steps", raising(ExhaustedError("away")))
        second.check_fresh_start()
    second.restored(0)
    checkpoint(second, 3)
    second.saved(3)
    assert "and has step_7" in second.close()["step_3"]
    assert onlooker.run(RUN).published_steps() == [7]


def raising(error):
    def work(*arguments, **options):
        raise error

    return work


def test_what_a_choice_leaves_behind_is_set_aside_when_the_bucket_is_back(machine, onlooker, monkeypatch, caplog):
    publish(machine("first"), 40, 60)  # checkpoint.keep_last is 2
    second = machine("second", 40)
    set_aside, away = RunSync.set_aside_after, [ExhaustedError("away for a moment")]

    def late(side, step):
        if away:
            raise away.pop()
        return set_aside(side, step)

    monkeypatch.setattr(RunSync, "set_aside_after", late)
    begin(second, 40)
    assert "is told later where this run goes on" in caplog.text
    checkpoint(second, 45)
    second.saved(45)
    assert second.close() == {}
    assert onlooker.run(RUN).published_steps() == [40, 45]
    assert lease_of(onlooker).epochs[-1] == (2, 40)


def test_who_may_not_set_aside_is_told_before_the_training(machine, monkeypatch):
    publish(machine("first"), 40)
    monkeypatch.setattr(RunSync, "set_aside_after", raising(AccessDenied("may not delete")))
    with pytest.raises(AccessDenied):
        begin(machine("second", "never"))


def test_a_stop_is_heeded_while_steps_are_set_aside(machine, monkeypatch):
    stop, beats, ended = StopRequest(), [], threading.Event()
    monkeypatch.setattr(errands, "_GRACE_SECONDS", 0.1)
    bucket = machine("here", "never", stop=stop, tick=lambda: beats.append(1))
    bucket.fetch()
    bucket.wait_for_checkpoint()
    beats.clear()

    def hanging(side, step):
        stop.request("test")
        ended.wait(60)
        return []

    monkeypatch.setattr(RunSync, "set_aside_after", hanging)
    started = time.monotonic()
    try:
        with pytest.raises(Interrupted):
            bucket.restored(0)
        assert time.monotonic() - started < 30
        assert beats
    finally:
        ended.set()


def test_what_cannot_be_fetched_is_known_before_it_is_waited_for(machine, monkeypatch):
    bucket, asked = machine(), threading.Event()

    def denied(*arguments):
        asked.wait(20)
        raise AccessDenied("the checkpoints are not for you")

    monkeypatch.setattr(RunSync, "fetch_checkpoint", denied)
    bucket.fetch()
    bucket.check()
    asked.set()
    for errand in bucket._errands._threads.values():
        errand.join(20)
    with pytest.raises(AccessDenied):
        bucket.check()


def test_the_logs_are_sent_at_the_end_even_if_nothing_else_is(machine, onlooker):
    bucket = machine()
    begin(bucket)
    bucket._paths.ledger.write_text('{"event": "end"}\n')
    assert bucket.close() == {}
    assert keys(onlooker, f"logs/{RUN}/") == [f"logs/{RUN}/ledger.jsonl"]


def test_the_logs_of_a_run_that_never_began_are_not_sent(machine, onlooker):
    bucket = machine()
    bucket.fetch()
    bucket.wait_for_checkpoint()
    bucket._paths.ledger.write_text("not ours to send\n")
    bucket.close()
    assert keys(onlooker, f"logs/{RUN}/") == []


def test_the_lease_is_released_within_the_time_to_close(machine, onlooker):
    bucket = machine()
    begin(bucket)
    queue = bucket._sync.background

    ended = []

    def endless():
        try:
            while True:
                queue.check()
                time.sleep(0.01)
        finally:
            ended.append(time.monotonic())

    queue.submit("checkpoint", "step_3", endless)
    started = time.monotonic()
    assert list(bucket.close(seconds=8.0)) == ["step_3"]
    assert bucket.unpublished == {3}  # it stays on the disk
    assert ended[0] - started < 8.0
    assert lease_of(onlooker).released


def test_who_loses_the_run_while_the_last_files_are_sent_knows_it(machine, onlooker):
    bucket = machine()
    begin(bucket)
    bucket._paths.final.write_text("weights")
    file = lease_of(onlooker)
    taken = LeaseFile(epoch=file.epoch + 1, holder=Holder.this(None), seconds=60, epochs=file.epochs)
    onlooker.store.put(onlooker.run(RUN).keys.lease, taken.data())
    bucket.finished()
    assert list(bucket.close()) == ["final.pt"]
    with pytest.raises(RunHeldError):
        bucket.check()


def test_a_best_model_without_its_plain_name_keeps_no_checkpoint_back(machine, onlooker, monkeypatch, caplog):
    monkeypatch.setattr(RunSync, "_show_best", raising(AccessDenied("no copies")))
    publish(machine(), 3)
    assert onlooker.run(RUN).published_steps() == [3]
    assert "not under its plain name" in caplog.text


def test_what_was_sent_is_told(machine):
    bucket, told = machine(), []
    bucket.on_published = lambda step, seconds, sent: told.append((step, sent))
    publish(bucket, 3)
    assert told == [(3, len("weights 3"))]


def test_beginnings_of_downloads_go_with_the_run_that_may_remove_them(machine):
    bucket = machine()
    beginning = bucket._paths.checkpoints / ".partial-step_20-0123456789ab"
    beginning.mkdir(parents=True)
    bucket.fetch_weights("20")  # an evaluation, beside a worker that may be fetching
    assert beginning.exists()
    bucket.fetch()
    bucket.wait_for_checkpoint()
    assert not beginning.exists()


def test_how_long_the_bucket_took_is_said_where_it_was_reached(machine, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "wmtp_worker")
    with monkeypatch.context() as patch:
        patch.setattr(RunSync, "fetch_checkpoint", raising(ExhaustedError("away")))
        bucket = machine("first")
        begin(bucket)
        bucket.close()
    assert "looked through in" not in caplog.text
    begin(machine("second"))
    assert "looked through in" in caplog.text
