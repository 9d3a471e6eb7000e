"""The sender of a run in this process, with a store on this disk."""

import json
import queue
import threading
import time

import pytest

from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.tracking import sender
from wmtp_worker.tracking.metrics import MetricsLog
from wmtp_worker.tracking.record import TrackedRun, read_servers
from wmtp_worker.tracking.rows import rows_of
from wmtp_worker.tracking.sender import Order, Sender
from wmtp_worker.tracking.server import KEY, OWNER, make_client


@pytest.mark.parametrize(
    ("look_after", "told"),
    [
        (0.2, []),  # while no step ends
        (600.0, [None]),  # the worker is killed
        (600.0, [json.dumps({"end": "FINISHED", "seconds": 30.0})]),
    ],
)
def test_who_lost_the_run_to_another_tells_nothing_more(look_after, told, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sender, "INTERVAL", 0.05)
    monkeypatch.setattr(sender, "_LOOK_AFTER", look_after)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    paths, uri, inbox = RunPaths(tmp_path, "run"), f"file:{tmp_path}/store", queue.Queue()
    paths.tracking_record.parent.mkdir(parents=True)
    TrackedRun(run="run", experiment="tests", settings_digest="d").write(paths.tracking_record)
    thread = threading.Thread(target=Sender(Order(uri, str(tmp_path), "run", "first"), inbox).work, daemon=True)
    thread.start()
    end = time.monotonic() + 60
    while not (known := read_servers(paths.tracking_servers)) and time.monotonic() < end:
        time.sleep(0.05)
    run, client = known[uri]["run_id"], make_client(uri)
    client.set_tag(run, OWNER, "second")
    for line in told:
        inbox.put(line)
    thread.join(60)
    assert not thread.is_alive()
    assert "the run is now logged by second" in capsys.readouterr().out
    assert client.get_run(run).info.status == "RUNNING"


@pytest.mark.parametrize(("owner", "taken"), [("host/1/abcd", False), ("push/1", True)])
def test_who_only_looks_takes_no_run_from_a_training(owner, taken, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    paths, uri, inbox = RunPaths(tmp_path, "run"), f"file:{tmp_path}/store", queue.Queue()
    record = TrackedRun(run="run", experiment="tests", settings_digest="d")
    record.write(paths.tracking_record)
    client = make_client(uri)
    run = client.create_run(client.create_experiment("tests"), tags={KEY: record.key, OWNER: owner}).info.run_id
    inbox.put(json.dumps({"end": "RUNNING", "seconds": 30.0}))
    assert Sender(Order(uri, str(tmp_path), "run", "push/2", viewer=True), inbox).work() is taken
    assert client.get_run(run).data.tags[OWNER] == ("push/2" if taken else owner)
    assert ("the run is logged by host/1/abcd" in capsys.readouterr().out) is not taken


def test_after_an_error_only_a_server_that_lost_something_is_sent_all_again(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    paths, store = RunPaths(tmp_path, "run"), tmp_path / "store"
    TrackedRun(run="run", experiment="tests", settings_digest="d").write(paths.tracking_record)
    working = Sender(Order(f"file:{store}", str(tmp_path), "run", "first"), queue.Queue())
    seen = []
    monkeypatch.setattr(sender, "rows_of", lambda line: seen.append(line["step"]) or rows_of(line))

    def goes_on(step):
        seen.clear()
        with MetricsLog(paths.metrics, paths.metrics.stat().st_size if paths.metrics.exists() else 0) as metrics:
            metrics.write("train", step, loss=1 / step)
        working._send()
        working._failed(OSError("the server is away"))
        [stored] = store.glob("*/*/metrics/loss")
        assert [int(line.split()[2]) for line in stored.read_text().splitlines()] == list(range(1, step + 1))
        return stored

    goes_on(1)
    assert seen == [1]
    stored = goes_on(2)
    assert seen == [2]
    stored.write_text(stored.read_text().splitlines()[0] + "\n")  # an older copy of it
    goes_on(3)
    assert seen == [1, 2, 3]
