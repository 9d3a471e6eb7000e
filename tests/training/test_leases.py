"""A run that is held by a lease in the bucket: who else may train it, and what is said about it."""

import json
import shlex
import time

import pytest

from wmtp_worker.errors import NotSafeError, RunHeldError, SettingsError
from wmtp_worker.storage import CloudSync
from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.storage.lease_file import Holder, LeaseFile, read_lease

RUN = "tiny"
QUICK = ("checkpoint.lease_seconds=3",)


@pytest.fixture
def bucket(tmp_path):
    """The settings of a run with a folder as its bucket."""
    (tmp_path / "disk").mkdir()
    return (*QUICK, "cloud.provider=local", f"cloud.bucket={tmp_path}/disk/bucket", "cloud.patience=0.5")


@pytest.fixture
def onlooker(tmp_path, bucket):
    from wmtp_worker.settings import load

    cloud = CloudSync(load(overrides=list(bucket), environ={}).cloud, tmp_path / "onlooker")
    yield cloud
    cloud.close()


def lease_of(cloud: CloudSync) -> LeaseFile:
    return read_lease(cloud.store, cloud.run(RUN).keys.lease).file


def take(cloud: CloudSync) -> None:
    """Be the worker that takes over."""
    file = lease_of(cloud)
    taken = LeaseFile(epoch=file.epoch + 1, holder=Holder.this(None), seconds=60, epochs=file.epochs)
    cloud.store.put(cloud.run(RUN).keys.lease, taken.data())


def test_a_second_worker_ends_with_79_before_it_trains(bucket, onlooker, tiny_run, tmp_path):
    onlooker.store.put("made", b"")
    lease = onlooker.hold(onlooker.run(RUN))
    lease.renew()
    # the holder renews it meanwhile, every third of a minute at the latest: so it is told to at once
    lease._seconds = 1.5
    lease.close()
    lease._stop.clear()
    lease.start()
    with pytest.raises(RunHeldError, match="is being trained by pid") as caught:
        tiny_run(tmp_path / "work", *bucket)
    assert caught.value.exit_code == 79
    assert not RunPaths(tmp_path / "work", RUN).metrics.exists()


def test_a_worker_whose_run_is_taken_ends_with_79(bucket, onlooker, tiny_run, monkeypatch, tmp_path):
    from wmtp_worker.training import loop

    step = loop.train_step

    def eventful(session, prefetcher):
        if session.progress.step == 5:
            deadline = time.monotonic() + 60
            while onlooker.run(RUN).published_steps() != [3] and time.monotonic() < deadline:
                time.sleep(0.05)
            take(onlooker)
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                session.bucket.check()
                time.sleep(0.05)
        return step(session, prefetcher)

    monkeypatch.setattr(loop, "train_step", eventful)
    with pytest.raises(RunHeldError, match=r"taken over by pid .* \(epoch 2\)"):
        tiny_run(tmp_path / "work", *bucket)
    assert onlooker.run(RUN).published_steps() == [3]
    assert lease_of(onlooker).epoch == 2


def test_a_worker_whose_run_is_taken_while_its_end_is_published_ends_with_79(
    bucket, onlooker, tiny_run, monkeypatch, tmp_path
):
    from wmtp_worker.training.bucket import RunBucket

    finished = RunBucket.finished

    def too_late(side):
        take(onlooker)
        finished(side)

    monkeypatch.setattr(RunBucket, "finished", too_late)
    with pytest.raises(RunHeldError, match="taken over by"):
        tiny_run(tmp_path / "work", *bucket, "training.max_steps=1", "training.warmup_steps=0")


def test_the_lease_tells_the_runs_history(bucket, onlooker, tiny_run, tmp_path):
    tiny_run(tmp_path / "work", *bucket)
    tiny_run(tmp_path / "elsewhere", *bucket)
    file = lease_of(onlooker)
    assert (file.epoch, file.released, file.epochs) == (2, True, ((1, 0), (2, 12)))
    told = json.loads(bytes(onlooker.store.get(onlooker.run(RUN).keys.heartbeat)[1]))
    assert told["run"] == RUN
    assert {"epoch", "holder", "time", "last_published_step", "lag"} <= told.keys()


def test_without_a_lease_nobody_is_kept_away(bucket, onlooker, tiny_run, tmp_path):
    tiny_run(tmp_path / "work", *bucket, "checkpoint.lease=false")
    keys = {info.key for info in onlooker.store.list(f"checkpoints/{RUN}/step_12/")}
    assert f"checkpoints/{RUN}/step_12/model.safetensors" in keys
    assert tiny_run(tmp_path / "elsewhere", *bucket, "checkpoint.lease=false").steps_taken == 0
    # a lease can be had later, and then is wanted
    assert tiny_run(tmp_path / "third", *bucket).steps_taken == 0
    with pytest.raises(SettingsError, match="is trained under leases"):
        tiny_run(tmp_path / "fourth", *bucket, "checkpoint.lease=false")


def test_what_is_not_safe_is_published_later_by_the_command_that_is_named(
    bucket, onlooker, tiny_run, monkeypatch, tmp_path
):
    from wmtp_worker.cli import main
    from wmtp_worker.errors import ExhaustedError
    from wmtp_worker.storage.runs import RunSync

    def away(*arguments, **options):
        raise ExhaustedError("away")

    with monkeypatch.context() as patch:
        patch.setattr(RunSync, "publish", away)
        patch.setattr(RunSync, "publish_file", away)
        with pytest.raises(NotSafeError) as caught:
            tiny_run(tmp_path / "work", *bucket)
    assert caught.value.exit_code == 74
    assert onlooker.run(RUN).published_steps() == []
    words = shlex.split(caught.value.fix.partition(": ")[2])
    variables = dict(word.split("=", 1) for word in words if "=" in word)
    command = [word for word in words if "=" not in word]
    assert command == ["wmtp", "checkpoints", "push", RUN]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(command[1:]) == 0
    assert onlooker.run(RUN).published_steps()[-1] == 12
    assert (tmp_path / "disk" / "bucket" / "checkpoints" / RUN / "final.pt").exists()
