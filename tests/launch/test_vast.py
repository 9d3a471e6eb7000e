"""An instance of Vast.ai, by the requests that its documentation describes."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.launch.conftest import SECRET
from tests.servers.vast import KEY, offer, vast_server  # noqa: F401
from wmtp_worker.launch import vast

BASE = ("vast", "me/wmtp", "--gpu-name", "RTX_4090", "--preset", "smoke")


@pytest.fixture
def service(vast_server, laptop, monkeypatch):  # noqa: F811
    monkeypatch.setattr(vast, "_POLL", 0.01)
    monkeypatch.delenv("VAST_API_KEY", raising=False)
    laptop.environ.update({"VAST_URL": vast_server.address, "VAST_API_KEY": KEY})
    vast_server.offers = [offer(1, 0.50), offer(2, 0.31), offer(3, 0.10, num_gpus=8), offer(4, 0.2, verified=False)]
    return vast_server


def test_the_cheapest_offer_that_fits_is_rented_and_given_back(service, laptop):
    said = laptop.launch(*BASE, "--yes", "--name", "one", "--set", "training.lr=1e-3")
    assert "offer      2, Sweden, SE: 0.310 USD an hour now" in said.stdout
    (created,) = [body for method, path, body in service.asked if (method, path) == ("PUT", "/api/v0/asks/2/")]
    assert created["image"] == "me/wmtp"
    assert created["env"]["AWS_SECRET_ACCESS_KEY"] == SECRET
    start = created["onstart"]
    assert SECRET not in start
    assert start.startswith("#!/bin/bash\n")
    subprocess.run(["sh", "-n"], input=start, text=True, check=True)
    assert (created["env"]["WMTP_WHEN_DONE"], created["env"]["WMTP_WHEN_IDLE"]) == ("destroy", "stop")
    words = shlex.split(re.search(r"start\.sh (.*) >>", start)[1])
    assert "training.lr=0.001" in words
    assert not any(SECRET in path or KEY in path for _, path, _ in service.asked)
    assert not [text for text in (said.stdout, laptop.registered[0].read_text()) if SECRET in text or KEY in text]

    assert json.loads(laptop.launch("status", "one", "--json").stdout)[0]["state"]["phase"] == "starting"
    service.instances[7002]["actual_status"] = "running"
    assert "running (instance 7002)" in laptop.launch("status", "one").stdout
    assert laptop.launch("logs", "one").stdout.startswith("step 1\nstep 2\n")
    assert "runs there already" in laptop.launch(*BASE, "--yes", "--name", "one", code=79).stderr
    assert "its disk is kept" in laptop.launch("stop", "one").stdout
    assert list(service.instances) == [7002]
    assert "vastai start instance 7002" in laptop.launch(*BASE, "--yes", "--name", "one", code=79).stderr
    assert "were given back" in laptop.launch("stop", "one", "--destroy").stdout
    assert service.instances == {}
    changes = [(method, path) for method, path, _ in service.asked if path.endswith("7002/") and method != "GET"]
    assert changes[-2:] == [("PUT", "/api/v0/instances/7002/"), ("DELETE", "/api/v0/instances/7002/")]
    assert "ended" in laptop.launch("status", "one").stdout
    assert "given back" in laptop.launch("stop", "one", "--destroy").stdout  # also where somebody else did it


@pytest.mark.parametrize(("most", "bid"), [((), 0.22), (("--max-price", 0.21), 0.21), (("--max-price", 0.5), 0.22)])
def test_a_bid_is_a_tenth_above_the_least_and_never_above_the_most(service, laptop, most, bid):
    service.offers = [offer(5, 0.2, is_bid=True, min_bid=0.2)]
    said = laptop.launch(*BASE, "--yes", "--interruptible", *most)
    (created,) = [body for method, path, body in service.asked if path == "/api/v0/asks/5/"]
    assert created["price"] == pytest.approx(bid)
    assert f"{bid:.3f} USD an hour now" in said.stdout


def test_what_was_rented_is_remembered_though_the_answer_was_lost(service, laptop):
    service.lost = True
    assert "no answer" in laptop.launch(*BASE, "--yes", "--name", "one", code=75).stderr
    before = laptop.registered[0].read_bytes()
    assert (
        "runs there already"
        in laptop.launch(*BASE, "--yes", "--name", "one", "--set", "training.lr=1e-3", code=79).stderr
    )
    assert laptop.registered[0].read_bytes() == before
    assert "were given back" in laptop.launch("stop", "one", "--destroy").stdout
    assert service.instances == {}


def test_a_job_elsewhere_is_not_forgotten(service, laptop):
    laptop.launch(*BASE, "--yes", "--name", "one")
    second = ("docker", "me/wmtp", "--preset", "smoke", "--yes", "--name", "one")
    assert "was launched elsewhere: starting" in laptop.launch(*second, code=79).stderr
    service.instances[7002]["actual_status"] = "offline"
    assert "was launched elsewhere: unreachable" in laptop.launch(*second, code=79).stderr
    assert "no answer" in laptop.launch(*second, code=79, VAST_URL="http://127.0.0.1:9").stderr
    assert '"vast"' in laptop.registered[0].read_text()
    service.instances.clear()
    assert "there is no docker" in laptop.launch(*second, code=78, PATH="/nowhere").stderr


def test_what_is_wrong_is_said(service, laptop):
    assert "nobody offers" in laptop.launch(*BASE, "--yes", "--max-price", 0.3, code=78).stderr
    assert "Invalid user key" in laptop.launch(*BASE, "--yes", code=78, VAST_API_KEY="another-key").stderr
    assert "no key of Vast.ai" in laptop.launch(*BASE, "--yes", code=78, VAST_API_KEY="").stderr
    service.taken = {2}
    assert "somebody else took that offer" in laptop.launch(*BASE, "--yes", code=75).stderr
    assert "no answer" in laptop.launch(*BASE, "--yes", code=75, VAST_URL="http://127.0.0.1:9").stderr
    assert "https alone" in laptop.launch(*BASE, "--yes", code=78, VAST_URL="http://example.org").stderr
    for resume in ("never", 10):
        assert "repeats the same" in laptop.launch(*BASE, "--yes", "--resume", resume, code=78).stderr
    assert "FOO would not reach" in laptop.launch(*BASE, "--yes", "--env", "FOO", code=78, FOO="x").stderr
    assert service.instances == {}


@pytest.mark.parametrize(
    ("address", "said"),
    [("http://127.0.0.1:9/log", "does not answer"), (None, "does not say where"), ("http://:x", "does not answer")],
)
def test_a_log_that_does_not_come(service, laptop, address, said):
    laptop.launch(*BASE, "--yes", "--name", "one")
    service.log_address = address
    assert said in laptop.launch("logs", "one", code=75).stderr


def test_a_key_file_that_cannot_be_read(service, laptop):
    file = laptop.home / ".config/vastai/vast_api_key"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"\xff\xfe")
    assert "cannot be read" in laptop.launch(*BASE, "--yes", code=78, VAST_API_KEY="").stderr


def test_a_path_of_this_machine_is_refused_before_anything_is_paid_for(service, laptop, tmp_path):
    for path in "./my-llama", "a/b/c", str(tmp_path):
        said = laptop.launch(*BASE, "--yes", "--set", f"model.path={path}", code=78).stderr
        assert f"wmtp assets push {path}" in said
    assert service.asked == []
    assert "it has to be there" in laptop.launch(*BASE, "--dry-run", "--set", "model.path=/of/the/image").stdout


def test_what_start_sh_takes_over_is_what_may_be_sent():
    text = (Path(__file__).resolve().parents[2] / "entrypoint/supervise.sh").read_text()
    assert f"ADOPTED='{vast.ADOPTED.pattern}'\n" in text


def test_a_dry_run_asks_nobody(service, laptop):
    said = laptop.launch(*BASE, "--dry-run").stdout
    assert "PUT " in said
    assert SECRET not in said
    assert KEY not in said
    assert service.asked == []
