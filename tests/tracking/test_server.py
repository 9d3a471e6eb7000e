"""The record on a real MLflow server: nothing lost, nothing doubled, whatever happens to either side."""

import base64
import contextlib
import http.client
import os
import secrets
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.servers import mlflow
from tests.servers.proxy import Proxy
from wmtp_worker.errors import Interrupted
from wmtp_worker.host.stop import StopRequest
from wmtp_worker.settings import load
from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.tracking import server as sending
from wmtp_worker.tracking import session
from wmtp_worker.tracking.metrics import MetricsLog
from wmtp_worker.tracking.record import TrackedRun, read_servers
from wmtp_worker.tracking.session import Tracking

# one server for all of them
pytestmark = pytest.mark.xdist_group("mlflow")

# a worker that logs forty steps and then hangs until it is killed
KILLED = """
import sys, time
from tests.tracking.test_server import working, step
from wmtp_worker.storage.layout import RunPaths
from pathlib import Path
folder, uri, home = sys.argv[1:]
with working(RunPaths(Path(folder), "run"), uri, home=home) as metrics:
    for number in range(1, 41):
        step(metrics, number)
    print("logged", flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def working(paths, uri, *, at=0, start=0, home=None, best_model="link", stop=None, **settings):
    """What a run does around its training: yields the metrics; those behind byte `at` are dropped."""
    chosen = load(overrides=[f"tracking.uri={uri}", "tracking.system_seconds=0"], environ={}).tracking
    record = TrackedRun(
        run=paths.run, experiment="tests", settings_digest="d", home=home, best_model=best_model, params={"lr": "0.1"}
    )
    paths.checkpoints.mkdir(parents=True, exist_ok=True)
    chosen = chosen.model_copy(update=settings)
    stop = stop or StopRequest()
    asked = {"seconds_left": lambda: stop.seconds_left, "stopping": lambda: stop.requested}
    with MetricsLog(paths.metrics, at) as metrics, Tracking(chosen, paths, record, start=start, **asked):
        yield metrics


def step(metrics, number):
    metrics.write("train", number, loss=1 / number, head_loss=[0.5, 1 / 3])


def run_id(paths, uri):
    return read_servers(paths.tracking_servers)[uri]["run_id"]


def until(condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)


def status(server, run):
    return server.query(f"select status from runs where run_uuid = '{run}'")[0][0]


def test_whatever_fails_between_each_step_arrives_once(logged_in, tmp_path):
    paths, server = RunPaths(tmp_path, "run"), logged_in
    with Proxy("127.0.0.1", server.port) as proxy:
        uri, number = proxy.endpoint, 0

        def more():
            nonlocal number
            for _ in range(30):
                number += 1
                step(metrics, number)

        def arrived():
            known = read_servers(paths.tracking_servers).get(uri)
            return known is not None and number in server.metrics(known["run_id"]).get("loss", [])

        proxy.answer(502, times=2)  # from the first request on
        with working(paths, uri) as metrics:
            more()
            until(arrived)
            proxy.lose_response(times=2, match="log-batch")  # it has arrived, and nobody knows
            more()
            until(arrived)
            proxy.answer(500, times=2)
            proxy.cut("up", 50, reset=True, match="log-batch")
            more()
            until(arrived)
            server.kill_mlflow()  # and nginx says 502
            more()
            server.start_mlflow()
            server.wait()
            proxy.latency_up = proxy.latency_down = 0.5  # a request takes a second, the first of a connection two
            more()
            until(arrived)
        assert number == 150
        run = run_id(paths, uri)
    found = server.metrics(run)
    assert found == {key: list(range(1, 151)) for key in ("loss", "head_loss_1", "head_loss_2")}
    assert status(server, run) == "FINISHED"
    values = server.query(f"select value from metrics where run_uuid = '{run}' and key = 'loss' order by step")
    assert [float(value) for (value,) in values] == [1 / number for number in range(1, 151)]


def test_one_run_across_a_kill_another_machine_and_a_stop(logged_in, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "_STOP_SECONDS", 120.0)  # a sender needs some on a busy machine
    server, home = logged_in, f"s3://bucket/{secrets.token_hex(4)}/checkpoints/run"
    first, second = RunPaths(tmp_path / "one", "run"), RunPaths(tmp_path / "two", "run")
    command = [sys.executable, "-c", KILLED, str(first.workdir), server.uri, home]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as worker:
        assert worker.stdout.readline() == b"logged\n"
        until(lambda: first.tracking_servers.exists())
        worker.send_signal(signal.SIGKILL)
    run = run_id(first, server.uri)
    until(lambda: status(server, run) == "KILLED")
    assert server.metrics(run)["loss"] == list(range(1, 41))  # what the killed one had written, too

    # the disk is gone, and nothing had been saved: it begins anew, as the same run
    sizes = {}

    def until_stopped():
        with working(second, server.uri, home=home) as metrics:
            for number in range(1, 51):
                step(metrics, number)
                sizes[number] = metrics.size
            until(second.tracking_servers.exists)
            raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        until_stopped()
    assert run_id(second, server.uri) == run
    assert status(server, run) == "KILLED"
    with working(second, server.uri, home=home, at=sizes[45], start=45) as metrics:
        for number in range(46, 61):
            step(metrics, number)
    assert server.metrics(run)["loss"] == list(range(1, 61))
    assert status(server, run) == "FINISHED"
    assert len(server.query(f"select 1 from tags where value = '{home}'")) == 1


def test_what_a_server_that_is_away_did_not_get_is_pushed_later(logged_in, tmp_path, monkeypatch, caplog):
    from wmtp_worker.cli import main

    paths, server = RunPaths(tmp_path, "run"), logged_in
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a-wrong-password")

    def until_it_fails():
        with working(paths, server.uri, close_seconds=5) as metrics:
            step(metrics, 1)
            raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        until_it_fails()
    assert "wmtp tracking push run" in caplog.text
    assert "a-wrong-password" not in caplog.text
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", server.environ["MLFLOW_TRACKING_PASSWORD"])
    monkeypatch.setenv("WMTP_WORKDIR", str(tmp_path))
    assert main(["tracking", "push", "run"]) == 0
    run = run_id(paths, server.uri)
    assert server.metrics(run)["loss"] == [1]
    assert status(server, run) == "FAILED"


def test_how_a_run_ended_is_told_before_its_best_model(logged_in, tmp_path, monkeypatch, caplog):
    from wmtp_worker.cli import main

    paths, server, stop = RunPaths(tmp_path, "run"), logged_in, StopRequest()
    with Proxy("127.0.0.1", server.port) as proxy:
        uri = proxy.endpoint
        proxy.stall("up", 0, match="best_model")

        def stop_at_the_model():
            until(lambda: any("best_model" in line for line in proxy.requests))
            stop.request("SIGTERM", time.monotonic() + 1)

        with working(paths, uri, best_model="move", close_seconds=300, stop=stop) as metrics:
            paths.best.write_bytes(b"weights" * 1000)
            step(metrics, 1)
            waiting = threading.Thread(target=stop_at_the_model)
            waiting.start()
        waiting.join()
        proxy.heal()
        run = run_id(paths, uri)
        assert status(server, run) == "FINISHED"
        assert "wmtp tracking push run" in caplog.text
        monkeypatch.setenv("WMTP_WORKDIR", str(tmp_path))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert main(["tracking", "push", "run"]) == 0
        assert any(line.startswith("PUT") and "best_model" in line for line in proxy.requests)
    assert not paths.best.exists()
    assert status(server, run) == "FINISHED"


def test_a_large_file_has_its_time_and_is_sent_once(logged_in, tmp_path, monkeypatch):
    from mlflow.exceptions import MlflowException

    monkeypatch.setattr(sending, "_LARGE", 10)
    file = tmp_path / "best_model.pt"
    file.write_bytes(b"weights" * 10)
    with Proxy("127.0.0.1", logged_in.port) as proxy:
        record = TrackedRun(run="run", experiment="tests", settings_digest="d")
        run = sending.ServerRun(sending.make_client(proxy.endpoint), record, "me", None)
        run.open()
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        proxy.call(lambda: time.sleep(3), match="^PUT")
        run.upload(file, "checkpoints")
        proxy.answer(500, times=9, match="^PUT")
        with pytest.raises(MlflowException, match="500"):
            run.upload(file, "checkpoints")
        assert [line.split()[0] for line in proxy.requests].count("PUT") == 2
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "1"


def test_a_password_that_changes_while_a_run_trains_and_back_costs_no_number(logged_in, tmp_path, caplog):
    paths, server = RunPaths(tmp_path, "run"), logged_in
    passwords = server.folder / "htpasswd"
    right = passwords.read_text()
    with working(paths, server.uri) as metrics:
        step(metrics, 1)
        until(lambda: paths.tracking_servers.exists() and server.metrics(run_id(paths, server.uri)))
        try:
            passwords.write_text("somebody:else\n")
            step(metrics, 2)
            until(lambda: "401" in caplog.text)
        finally:
            passwords.write_text(right)
        step(metrics, 3)
    run = run_id(paths, server.uri)
    assert server.metrics(run)["loss"] == [1, 2, 3]
    assert status(server, run) == "FINISHED"


@pytest.mark.parametrize(
    ("origin", "code"),
    [("https://mlflow.example.com", 200), ("https://evil.example.com", 403), ("null", 403), (None, 200)],
)
def test_its_own_pages_may_ask_and_foreign_ones_may_not(logged_in, origin, code):
    """By the name that people know the server by, which only nginx is told."""
    key = base64.b64encode(f"{mlflow.USER}:{mlflow.PASSWORD}".encode()).decode()
    headers = {"Host": "mlflow.example.com", "Authorization": f"Basic {key}", "Content-Type": "application/json"}
    connection = http.client.HTTPConnection("127.0.0.1", logged_in.port, timeout=30)
    with contextlib.closing(connection):
        headers |= {"Origin": origin} if origin else {}
        connection.request("POST", "/ajax-api/2.0/mlflow/experiments/search", b'{"max_results": 1}', headers)
        assert connection.getresponse().status == code
