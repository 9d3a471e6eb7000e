"""The real worker on another machine: data from the bucket straight to it, the connection only carries the command."""

import json
import os
import shutil
import threading
import time
from importlib.resources import files
from pathlib import Path

import pytest

from tests.servers.proxy import Proxy
from tests.servers.s3 import ACCESS_KEY, SECRET_KEY

BALLAST = 50_000_000
LARGEST_CONNECTION = 200_000  # bytes, both ways, of launching, asking and stopping


@pytest.fixture
def lab(laptop, seaweed, tmp_path, tiny_model_folder):
    """A bucket with a model, a tokenizer and 50 MB of data, and the laptop's variables for it."""
    environ = {**seaweed.environ, "CLOUD_BUCKET": seaweed.make_bucket(), "CLOUD_ENDPOINT_URL": seaweed.endpoint}
    data = tmp_path / "data"
    shutil.copytree(str(files("wmtp_worker") / "data" / "sample"), data)
    (data / "ballast.bin").write_bytes(os.urandom(BALLAST))
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(str(files("wmtp_worker") / "data" / "tokenizer"), tokenizer)
    for folder, name, kind in (
        (tiny_model_folder, "small", ()),
        (tokenizer, "words", ()),
        (data, "big", ("--dataset",)),
    ):
        laptop.run("assets", "push", folder, "--name", name, *kind, **(laptop.environ | environ))
    return environ


def test_a_whole_training_whose_data_never_passes_through_the_laptop(host, laptop, lab, seaweed, tiny_settings):
    workdir = host.home / "work-real"
    wanted = [setting for setting in tiny_settings if not setting.startswith("model.")]
    wanted += (
        "model.path=small",
        "model.tokenizer=words",
        "model.heads=2",
        "data.dataset=big",
        "training.max_steps=100000",
        "checkpoint.every=3",
    )
    options = [part for setting in wanted for part in ("--set", setting)]
    given = ("--preset", "smoke", "--run-name", "far", "--checkout", "/none", "--no-logs", "--yes")
    given += ("--workdir", workdir)

    together, arrived = threading.Barrier(3), []
    with Proxy("127.0.0.1", seaweed.port) as proxy:
        for prefix in ("models/small/", "models/words/", "datasets/big/"):
            # each of the three waits until the others are on their way too
            proxy.call(lambda: arrived.append(together.wait(60)), match=f"^GET .*{prefix}")
        train(host, laptop, lab | {"CLOUD_ENDPOINT_URL": proxy.endpoint}, seaweed, (*given, *options), workdir)
    assert sorted(arrived) == [0, 1, 2]


def train(host, laptop, lab, seaweed, options, workdir):
    before = host.relay.bytes
    laptop.launch("ssh", host.address, *options, **lab)
    log = host.home / ".local/state/wmtp/jobs/far/log"
    deadline = time.monotonic() + 250
    while "is in the bucket" not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    seen = laptop.launch("logs", "far", **lab).stdout
    said = laptop.launch("stop", "far", **lab).stdout
    assert "ended with 75" in said
    assert "is in the bucket: any machine goes on from there" in said
    assert host.relay.bytes - before < LARGEST_CONNECTION

    for name in ("small", "words", "big"):
        assert f"{name}: " in seen  # fetched by the host itself
    assert (workdir / "datasets/big/ballast.bin").stat().st_size == BALLAST
    keys = [item["Key"] for item in seaweed.client().list_objects_v2(Bucket=lab["CLOUD_BUCKET"])["Contents"]]
    assert [key for key in keys if key.startswith("checkpoints/far/step_")]
    assert not [key for key in keys if key.startswith("logs/")]
    texts = [path.read_bytes() for root in (host.home, laptop.home) for path in root.rglob("*") if path.is_file()]
    assert not [text for text in texts if SECRET_KEY.encode() in text or ACCESS_KEY.encode() in text]
    (row,) = json.loads(laptop.launch("status", "far", "--json", **lab).stdout)
    assert row["state"]["exit_code"] == 75
    assert SECRET_KEY not in Path(laptop.registered[0]).read_text()
