"""`wmtp assets`: from a folder or the hub into the bucket, from there to another machine, and what is said of it."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

SECRET = "hf_p1antedS3cretOfNobody"
WEIGHTS = bytes(range(256)) * 64


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_bytes(b"{}")
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    return folder


@pytest.fixture
def dataset(tmp_path):
    folder = tmp_path / "few"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(b"{}\n")
    return folder


@pytest.fixture(params=["directory", "s3"])
def bucket(request):
    """The variables of a worker with an empty bucket."""
    server = request.getfixturevalue(f"{request.param}_server")
    return server.variables(server.make_bucket())


@pytest.fixture
def folder_bucket(directory_server):
    return directory_server.variables(directory_server.make_bucket())


@pytest.fixture
def asked(hub):
    """The variables of a worker that takes the test's hub for the real one."""
    return {"HF_ENDPOINT": hub.url}


def test_pushed_here_and_pulled_elsewhere(command, bucket, model, dataset, tmp_path):
    here = command("assets", "push", model, **bucket).stdout
    assert "models/my-model/  2 files, 0.0 MB, digests recorded" in here
    assert command("assets", "push", model, **bucket).stdout.startswith("was there already: ")
    command("assets", "push", dataset, "--dataset", "--name", "org/few", **bucket)
    elsewhere = bucket | {"WMTP_WORKDIR": str(tmp_path / "elsewhere")}
    report = json.loads(command("assets", "pull", "my-model", "--json", **elsewhere).stdout)
    assert (report["fetched"], report["files"], report["bytes"]) == (True, 2, len(WEIGHTS) + 2)
    assert (tmp_path / "elsewhere" / "models" / "my-model" / "model.safetensors").read_bytes() == WEIGHTS
    again = command("assets", "pull", "my-model", **elsewhere).stdout
    assert again == f"was there already: {tmp_path}/elsewhere/models/my-model\n"
    command("assets", "pull", "org/few", "--dataset", **elsewhere)
    assert (tmp_path / "elsewhere" / "datasets" / "org--few" / "train.jsonl").exists()
    for arguments in (["my-model"], ["my-model", "--read"], ["org/few", "--dataset"]):
        lines = command("assets", "verify", *arguments, **elsewhere).stdout.splitlines()
        assert [line.split()[0] for line in lines] == ["verified", "verified"]


def test_from_the_hub_into_the_bucket_only_when_asked(command, folder_bucket, hub, asked, model, tmp_path):
    hub.model("org/tiny", model)
    variables = folder_bucket | asked
    pulled = command("assets", "pull", "org/tiny", **variables).stdout
    assert f"from {hub.url}/org/tiny in " in pulled
    items = json.loads(command("assets", "ls", "--json", **variables).stdout)
    assert [(item["name"], item["bucket"]) for item in items] == [("org--tiny", None)]
    # pushed as it lies here, without asking the hub again
    hub.requests.clear()
    assert "models/org--tiny/  2 files" in command("assets", "push", "org/tiny", **variables).stdout
    assert hub.requests == []
    # and straight from the hub where it is not here
    hub.dataset("org/few", {"train.jsonl": b"{}\n"})
    command("assets", "push", "org/few", "--dataset", **variables)
    items = json.loads(command("assets", "ls", "--json", **variables).stdout)
    assert [(item["kind"], item["name"], item["bucket"]["recorded"]) for item in items] == [
        ("datasets", "org--few", True),
        ("models", "org--tiny", True),
    ]


def test_ls_for_people(command, folder_bucket, model, tmp_path):
    command("assets", "push", model, **folder_bucket)
    unfinished = tmp_path / "here" / "work" / "datasets" / "here"
    unfinished.mkdir(parents=True)
    lines = command("assets", "ls", **folder_bucket).stdout.splitlines()
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    assert rows == [
        ["datasets", "here", "0.0 MB, no digests", "-"],
        ["models", "my-model", "-", "0.0 MB, digests recorded"],
    ]


def test_odd_characters_do_not_reach_the_terminal(command, folder_bucket):
    folder = Path(folder_bucket["WMTP_CLOUD__BUCKET"]) / "models" / "\x1b[31mred"
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(b"{}")
    shown = command("assets", "ls", **folder_bucket).stdout
    assert "\x1b" not in shown
    assert "\\x1b[31mred" in shown


def test_a_damaged_side_ends_with_78(command, folder_bucket, model, directory_server):
    command("assets", "push", model, **folder_bucket)
    command("assets", "pull", "my-model", **folder_bucket)
    bucket = folder_bucket["WMTP_CLOUD__BUCKET"]
    (command_folder := model.parent / "here" / "work" / "models" / "my-model" / "config.json").write_bytes(b"[]")
    found = json.loads(command("assets", "verify", "my-model", "--json", code=78, **folder_bucket).stdout)
    assert [(side["status"], side["problem"]) for side in found] == [
        ("damaged", "config.json was changed: its SHA-256 differs"),
        ("verified", None),
    ]
    command_folder.write_bytes(b"{}")
    with open(f"{bucket}/models/my-model/model.safetensors", "ab") as file:
        file.write(b"!")
    shown = command("assets", "verify", "my-model", code=78, **folder_bucket).stdout
    assert f"damaged       {bucket}/models/my-model/: model.safetensors has {len(WEIGHTS) + 1} bytes" in shown


def test_what_cannot_be_verified_is_no_success(command, folder_bucket, tmp_path):
    (tmp_path / "here" / "work" / "models" / "x").mkdir(parents=True)
    shown = command("assets", "verify", "x", code=78, **folder_bucket).stdout
    assert [line.split()[:2] for line in shown.splitlines()] == [["not", "recorded"], ["not", "there"]]


def test_verify_says_where_the_kind_is_the_other_one(command, folder_bucket, model, dataset):
    command("assets", "push", model, **folder_bucket)
    command("assets", "push", dataset, "--dataset", **folder_bucket)
    for side in ("bucket", "work directory"):
        if side == "work directory":
            command("assets", "pull", "my-model", **folder_bucket)
            command("assets", "pull", "few", "--dataset", **folder_bucket)
        variables = folder_bucket if side == "bucket" else {}
        said = command("assets", "verify", "few", code=78, **variables).stderr
        assert "there is no model 'few'" in said
        assert said.endswith("there is a dataset of this name: add --dataset\n")
        said = command("assets", "verify", "my-model", "--dataset", code=78, **variables).stderr
        assert said.endswith("there is a model of this name: leave out --dataset\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["push", "none"], ["there is no folder 'none'"]),
        (["push", "my-file"], ["is no folder"]),
        (["push", "empty"], ["the folder holds no model or tokenizer", "--dataset"]),
        (["push", "empty", "--name", "../x"], ["'../x' is no name"]),
        (["pull", "none"], ["NAME='none' is not there", "models/none"]),
        (["pull", "/tmp"], ["'/tmp' is no name of a model"]),
        (["verify", "none"], ["there is no model 'none'", "wmtp assets ls"]),
        (["pull", "org/none", "--dataset"], ["the hub has no dataset org/none"]),
        (["pull", "org/gated"], ["org/gated is gated", "accept its licence", "set HF_TOKEN"]),
    ],
)
def test_mistakes_are_said_in_one_line(command, folder_bucket, hub, asked, tmp_path, arguments, words):
    hub.model("org/gated", {"config.json": b"{}", "model.safetensors": WEIGHTS}, gated=True)
    (tmp_path / "here" / "empty").mkdir()
    (tmp_path / "here" / "my-file").touch()
    done = command("assets", *arguments, code=78, HF_TOKEN=SECRET, **folder_bucket, **asked)
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert SECRET not in done.stderr
    for word in words:
        assert word in done.stderr


def test_without_a_bucket(command, hub, asked, model):
    assert "set CLOUD_PROVIDER and CLOUD_BUCKET" in command("assets", "push", model, code=78).stderr
    hub.model("org/tiny", model)
    command("assets", "pull", "org/tiny", **asked)
    assert command("assets", "verify", "org/tiny").stdout.startswith("verified ")
    assert [item["name"] for item in json.loads(command("assets", "ls", "--json").stdout)] == ["org--tiny"]
    assert "there is no model 'x'" in command("assets", "verify", "x", code=78).stderr


def test_a_changed_folder_takes_the_place_of_the_old_one_only_when_asked(command, folder_bucket, model):
    command("assets", "push", model, **folder_bucket)
    (model / "config.json").write_bytes(b"[]")
    refused = command("assets", "push", model, code=78, **folder_bucket)
    assert "delete its manifest.json" in refused.stderr
    (model / "manifest.json").unlink()
    assert "--replace" in command("assets", "push", model, code=78, **folder_bucket).stderr
    command("assets", "push", model, "--replace", **folder_bucket)
    command("assets", "verify", "my-model", "--read", **folder_bucket)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_pull_that_was_stopped_or_killed_goes_on(hub, model, tmp_path, number, code):
    hub.model("org/tiny", model)
    hub.pause = threading.Event()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WMTP_", "CLOUD_"))}
    environ = kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "WMTP_ENV_FILE": os.devnull}
    options = {"cwd": tmp_path, "env": environ, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-m", "wmtp_worker", "assets", "pull", "org/tiny"]
    with subprocess.Popen(command, **options) as process:
        assert hub.waiting.wait(60)
        process.send_signal(number)
        if number == signal.SIGTERM:
            line = process.stderr.readline()  # it has heard
            assert line.startswith("wmtp: SIGTERM: stopping")
            hub.pause.set()
        _, said = process.communicate(timeout=180)
        assert process.returncode == code
    folder = tmp_path / "work" / "models" / "org--tiny"
    assert not folder.exists()
    assert "Traceback" not in said
    hub.pause.set()
    done = subprocess.run(command, **options | {"stdout": None, "stderr": None}, timeout=180, check=True)
    assert done.returncode == 0
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert list(folder.parent.iterdir()) == [folder]
