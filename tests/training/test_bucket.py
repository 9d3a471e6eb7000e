"""A run and its bucket when things go wrong: training goes on, nothing is lost, and the end tells the truth."""

import json
import threading
import time
from urllib.parse import urlsplit

import pytest

from tests.servers.proxy import Proxy
from wmtp_worker.errors import AccessDenied, BucketNotFound, ExhaustedError, Interrupted, NotSafeError
from wmtp_worker.host.stop import StopRequest
from wmtp_worker.storage import CloudSync
from wmtp_worker.storage.layout import RunPaths

RUN = "tiny"


@pytest.fixture
def s3(s3_server, monkeypatch):
    """The S3 server behind a proxy, a new bucket in it, and the settings of a run that uses it."""
    for name, value in s3_server.environ.items():
        monkeypatch.setenv(name, value)
    parts = urlsplit(s3_server.endpoint)
    with Proxy(parts.hostname, parts.port) as proxy:
        proxy.bucket = s3_server.make_bucket()
        proxy.settings = (
            "cloud.provider=s3",
            f"cloud.bucket={proxy.bucket}",
            f"cloud.endpoint_url=http://127.0.0.1:{proxy.port}",
            "cloud.patience=0.5",
            "cloud.close_seconds=120",
        )
        proxy.side = lambda workdir: CloudSync(s3_server.cloud(proxy.bucket), workdir).run(RUN)
        yield proxy
    deadline = time.monotonic() + 60  # one that hung in the network ends with the proxy, but not at once
    while (left := ours()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []


def ours():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("uploads", "transfer"))]


@pytest.fixture
def published(s3, s3_server, tmp_path):
    """The steps in the bucket now."""

    def steps():
        with CloudSync(s3_server.cloud(s3.bucket), tmp_path / "onlooker") as cloud:
            return cloud.run(RUN).published_steps()

    return steps


def test_a_bucket_that_is_away_all_the_time(s3, tiny_run, run_record, published, tmp_path):
    s3.refuse()
    with pytest.raises(NotSafeError, match="not in the bucket yet: ") as caught:
        tiny_run(tmp_path / "work", *s3.settings, "cloud.close_seconds=3", "tracking.system_seconds=0.01")
    assert caught.value.exit_code == 74
    assert {"step_12", "final.pt"} <= set(caught.value.what.replace(",", " ").replace(";", " ").split())
    assert str(tmp_path / "work") in caught.value.fix
    measured = RunPaths(tmp_path / "work", RUN).system.read_text().splitlines()
    lags = [json.loads(line)["checkpoint_lag_steps"] for line in measured]
    assert lags == sorted(lags)
    assert lags[-1] > 0
    tiny_run(tmp_path / "reference")
    assert run_record(tmp_path / "work") == run_record(tmp_path / "reference")

    s3.accept()
    assert tiny_run(tmp_path / "work", *s3.settings).steps_taken == 0
    assert published() == [12]
    # another machine finds all of it
    assert tiny_run(tmp_path / "elsewhere", *s3.settings).steps_taken == 0
    assert run_record(tmp_path / "elsewhere") == run_record(tmp_path / "reference")


def test_a_bucket_that_goes_away_and_comes_back_while_training(s3, tiny_run, published, monkeypatch, tmp_path, caplog):
    from wmtp_worker.training import loop

    step = loop.train_step

    def eventful(session, prefetcher):
        if session.progress.step == 4:
            s3.refuse()
        if session.progress.step == 10:
            s3.accept()
        return step(session, prefetcher)

    monkeypatch.setattr(loop, "train_step", eventful)
    tiny_run(tmp_path / "work", *s3.settings)
    assert published()[-1] == 12


def test_a_wrong_bucket_ends_the_run_before_it_begins(s3, tiny_run, tmp_path):
    with pytest.raises(BucketNotFound) as caught:
        tiny_run(tmp_path / "work", *s3.settings, "cloud.bucket=no-such-bucket")
    assert caught.value.exit_code == 78
    assert not RunPaths(tmp_path / "work", RUN).metrics.exists()


def test_a_folder_as_bucket_may_be_new_but_not_far_from_what_is_there(tiny_run, tmp_path):
    folder = ("cloud.provider=local", f"cloud.bucket={tmp_path}/disk/bucket")
    with pytest.raises(BucketNotFound, match=r"make .*/disk, mount the disk"):
        tiny_run(tmp_path / "work", *folder)
    (tmp_path / "disk").mkdir()
    tiny_run(tmp_path / "work", *folder)
    assert (tmp_path / "disk" / "bucket" / "checkpoints" / RUN / "step_12" / "manifest.json").exists()
    assert tiny_run(tmp_path / "elsewhere", *folder).steps_taken == 0


def test_wrong_credentials_end_the_run_before_it_begins(s3, s3_server, tiny_run, monkeypatch, tmp_path):
    for name, value in s3_server.wrong_environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(AccessDenied) as caught:
        tiny_run(tmp_path / "work", *s3.settings)
    assert caught.value.exit_code == 78
    assert not RunPaths(tmp_path / "work", RUN).metrics.exists()


def test_data_that_only_the_bucket_has_cannot_be_done_without_it(s3, tiny_run, tmp_path):
    s3.refuse()
    with pytest.raises(ExhaustedError) as caught:
        tiny_run(tmp_path / "work", *s3.settings, "data.dataset=ours")
    assert caught.value.exit_code == 75


def test_a_stop_saves_and_publishes(s3, tiny_run, published, monkeypatch, tmp_path):
    from wmtp_worker.training import loop

    stop, step = StopRequest(), loop.train_step

    def stopping(session, prefetcher):
        if session.progress.step == 5:
            deadline = time.monotonic() + 60  # one that still waits would make way for the newer one
            while published() != [3] and time.monotonic() < deadline:
                time.sleep(0.05)
            stop.request("SIGTERM")
        return step(session, prefetcher)

    monkeypatch.setattr(loop, "train_step", stopping)
    with pytest.raises(Interrupted) as caught:
        tiny_run(tmp_path / "work", *s3.settings, stop=stop)
    assert "not in the bucket" not in str(caught.value)
    assert published() == [3, 5]


def test_a_stop_says_what_is_not_in_the_bucket(s3, tiny_run, monkeypatch, tmp_path):
    from wmtp_worker.training import loop

    stop, step = StopRequest(), loop.train_step

    def stopping(session, prefetcher):
        if session.progress.step == 5:
            s3.refuse()
            stop.request("SIGTERM")
        return step(session, prefetcher)

    monkeypatch.setattr(loop, "train_step", stopping)
    with pytest.raises(Interrupted, match="not in the bucket yet: step_5"):
        tiny_run(tmp_path / "work", *s3.settings, "cloud.close_seconds=3", stop=stop)
    assert RunPaths(tmp_path / "work", RUN).steps() == [3, 5]


@pytest.mark.parametrize(("resume", "first"), [("never", 0), (9, 9)])
def test_going_back_sets_later_steps_aside_in_the_bucket_too(
    s3, s3_server, tiny_run, published, resume, first, tmp_path
):
    tiny_run(tmp_path / "work", *s3.settings)
    before = published()  # a save may have come too soon after another to be published
    assert before[-1] == 12
    summary = tiny_run(tmp_path / "work", *s3.settings, resume=resume)
    assert summary.steps_taken == 12 - first
    assert published()[-1] == 12
    with CloudSync(s3_server.cloud(s3.bucket), tmp_path / "onlooker") as cloud:
        aside = {info.key.split("/")[3] for info in cloud.store.list(f"checkpoints/{RUN}/set-aside-")}
    # the exports and a copy of the logs go with them
    assert aside - {"best_model.pt", "final.pt", "logs", "shared"} == {
        f"step_{step}" for step in before if step > first
    }
    assert {"best_model.pt", "final.pt", "logs"} <= aside


def test_a_checkpoint_on_its_way_stays_on_the_disk(s3, tiny_run, published, tmp_path):
    # each answer comes late, so saves come faster than uploads
    s3.latency_down = 0.1
    limits = ("checkpoint.every=1", "checkpoint.keep_last=1", "evaluation.every=0", "cloud.close_seconds=90")
    tiny_run(tmp_path / "work", *s3.settings, *limits)
    assert published() == [12]
    assert RunPaths(tmp_path / "work", RUN).steps()[-1] == 12


def test_an_evaluation_takes_from_the_bucket_what_is_not_here(s3, tiny_run, tiny_settings, published, tmp_path):
    from wmtp_worker.settings import load
    from wmtp_worker.training.evaluate import evaluate_run

    expected = tiny_run(tmp_path / "work", *s3.settings).validation["loss"]
    for weights in ("final", "12", "best"):
        settings = load(
            overrides=[*tiny_settings, *s3.settings],
            options={"run.name": RUN, "run.workdir": str(tmp_path / weights)},
            environ={},
        )
        loss = evaluate_run(settings, weights, StopRequest())["loss"]
        assert loss == pytest.approx(expected) or weights == "best"


def work(store):
    """Every object of the bucket in its version, apart from those that tell who is at work."""
    told = ("lease.json", "heartbeat.json")
    return {info.key: info.version for info in store.list("") if not info.key.endswith(told)}


def test_a_bucket_that_was_not_seen_is_not_changed(s3, tiny_run, published, monkeypatch, tmp_path):
    from wmtp_worker.training import loop

    tiny_run(tmp_path / "first", *s3.settings)
    side = s3.side(tmp_path / "onlooker")
    before = work(side.store)
    step = loop.train_step

    def eventful(session, prefetcher):
        if session.progress.step == 2:
            s3.accept()
        return step(session, prefetcher)

    monkeypatch.setattr(loop, "train_step", eventful)
    s3.refuse()
    with pytest.raises(NotSafeError, match="and has step_12"):
        tiny_run(tmp_path / "second", *s3.settings)
    assert work(side.store) == before
    # the next start goes on from what is in the bucket
    assert tiny_run(tmp_path / "third", *s3.settings).steps_taken == 0


def test_a_wanted_step_cannot_be_had_without_the_bucket(s3, tiny_run, tmp_path):
    s3.refuse()
    with pytest.raises(ExhaustedError):
        tiny_run(tmp_path / "work", *s3.settings, resume=9)


def test_the_first_error_is_told_not_its_consequence(s3, s3_server, tiny_run, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "wmtp_worker.training.bucket.fetch", lambda settings, transfer, check: [check() for _ in forever()]
    )
    with pytest.raises(BucketNotFound):
        tiny_run(tmp_path / "work", *s3.settings, "cloud.bucket=no-such-bucket")


def forever():
    while True:
        time.sleep(0.01)
        yield


def test_who_may_not_delete_can_publish_all_the_same(s3, tiny_run, published, monkeypatch, tmp_path, caplog):
    from wmtp_worker.storage.runs import RunSync

    def refused(*arguments):
        raise AccessDenied("may not delete")

    monkeypatch.setattr(RunSync, "prune", refused)
    tiny_run(tmp_path / "work", *s3.settings)
    assert published()[-1] == 12


def test_a_stop_ends_the_wait_for_a_stalled_bucket(s3, tiny_run, tmp_path):
    stop = StopRequest()
    s3.stall("down", 0, times=1000)
    timer = threading.Timer(1.0, stop.request, ["SIGTERM"])
    timer.start()
    started = time.monotonic()
    with pytest.raises(Interrupted):
        tiny_run(tmp_path / "work", *s3.settings, stop=stop)
    assert time.monotonic() - started < 50  # a silent server is given a minute
    s3.heal()


def test_a_log_that_cannot_be_sent_keeps_no_checkpoint_back(s3, tiny_run, published, tmp_path):
    logs = RunPaths(tmp_path / "work", RUN).logs
    logs.mkdir(parents=True)
    (logs / "odd\\name").write_text("not for every bucket")
    tiny_run(tmp_path / "work", *s3.settings)
    assert published()[-1] == 12


def test_without_a_bucket_nothing_is_asked_and_nothing_imported(tiny_run, tmp_path):
    assert tiny_run(tmp_path / "work").bucket is None
    assert not (tmp_path / "work" / ".sync").exists()


def test_a_bucket_that_is_the_work_directory_is_none(tiny_run, tmp_path):
    settings = ("cloud.provider=local", f"cloud.bucket={tmp_path}", "cloud.prefix=work")
    assert tiny_run(tmp_path / "work", *settings, "training.max_steps=2", "training.warmup_steps=1").bucket is None
