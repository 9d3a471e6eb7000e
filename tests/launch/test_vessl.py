"""A run on VESSL: what its command is told, by a stand-in that talks as vessl 0.1.199 does."""

import json
import os
import sys

import pytest
import yaml

from tests.launch.conftest import KEY, SECRET
from wmtp_worker.launch import vessl

BASE = ("vessl", "me/wmtp", "--cluster", "lab", "--resource-preset", "gpu-l4", "--preset", "smoke")
STAND_IN = """#!{python}
# keeps what it is told in a folder; colours words even where nobody sees them
import json, pathlib, sys
import yaml
here = pathlib.Path({folder!r})
words = sys.argv[1:]
with (here / "told").open("a") as file:
    file.write(json.dumps(words) + "\\n")
status = here / "status"
if not (here / "token").exists():
    sys.exit("Invalid access token. Please run `vessl configure`.")
if words[:2] == ["run", "list"]:
    if status.exists():
        print(" 7   wmtp-one  batch  " + status.read_text() + "  2026-11-22")
elif words[:2] == ["run", "create"]:
    text = pathlib.Path(words[3]).read_text()
    document = yaml.safe_load(text)
    if document["resources"]["cluster"] != "lab":
        print("\\x1b[31m cluster does not exist!\\x1b[0m")
    else:
        (here / "run.yaml").write_text(text)
        status.write_text("running")
        print("\\x1b[36m Check your Run at: https://app.vessl.ai/me/runs/first/7\\x1b[0m")
elif words[:2] == ["run", "read"]:
    print(" \\x1b[32mID\\x1b[0m 7\\n \\x1b[32mStatus\\x1b[0m " + status.read_text())
elif words[:2] == ["run", "logs"]:
    print("[12:00:00.000000] step 1")
elif words[:2] == ["run", "terminate"]:
    status.write_text("terminated")
"""


@pytest.fixture
def service(laptop, tmp_path, monkeypatch):
    monkeypatch.setattr(vessl, "_POLL", 0.01)
    folder, programs = tmp_path / "vessl", tmp_path / "bin"
    folder.mkdir()
    programs.mkdir()
    (folder / "token").touch()
    program = programs / "vessl"
    program.write_text(STAND_IN.format(python=sys.executable, folder=str(folder)))
    program.chmod(0o755)
    laptop.environ["PATH"] = f"{programs}:{os.environ['PATH']}"
    return folder


def test_a_run_is_made_found_and_terminated(service, laptop):
    said = laptop.launch(*BASE, "--yes", "--name", "one", "--set", "training.lr=1e-3")
    document = yaml.safe_load((service / "run.yaml").read_text())
    assert document["image"] == "me/wmtp"
    assert document["resources"] == {"cluster": "lab", "preset": "gpu-l4"}
    assert document["env"]["AWS_SECRET_ACCESS_KEY"] == {"value": SECRET, "secret": True}
    assert document["env"]["AWS_ACCESS_KEY_ID"] == {"value": KEY, "secret": True}
    (step,) = document["run"]
    assert step["command"].startswith("exec /opt/wmtp/entrypoint/start.sh --recipe baseline --preset smoke")
    assert "--set training.lr=0.001" in step["command"]
    for text in (said.stdout, (service / "told").read_text(), laptop.registered[0].read_text()):
        assert SECRET not in text
    assert json.loads(laptop.launch("status", "one", "--json").stdout)[0]["state"]["phase"] == "running"
    laptop.registered[0].unlink()  # another laptop: what is found there can be stopped from here
    assert "runs there already" in laptop.launch(*BASE, "--yes", "--name", "one", code=79).stderr
    assert "step 1" in laptop.launch("logs", "one", "--follow").stdout
    assert "ended (run 7 is terminated)" in laptop.launch("stop", "one").stdout


def test_what_is_wrong_is_said(service, laptop):
    laptop.launch(*BASE, "--yes", "--name", "one")
    elsewhere = [word if word != "lab" else "nowhere" for word in BASE]
    assert "cluster does not exist" in laptop.launch(*elsewhere, "--yes", code=78).stderr
    (service / "token").unlink()
    assert "vessl configure" in laptop.launch(*BASE, "--yes", code=78).stderr
    assert "vessl configure" in laptop.launch("logs", "one", code=78).stderr
    assert "there is no vessl on this machine" in laptop.launch(*BASE, "--yes", code=78, PATH="/nowhere").stderr


def test_a_dry_run_shows_the_yaml_and_needs_no_vessl(laptop):
    said = laptop.launch(*BASE, "--dry-run", PATH="/nowhere").stdout
    assert SECRET not in said
    document = yaml.safe_load(said.split("its stdin:\n")[1])
    assert document["env"]["AWS_SECRET_ACCESS_KEY"] == {"value": "***", "secret": True}
