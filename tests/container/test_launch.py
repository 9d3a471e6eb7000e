"""`wmtp launch` with the real image and engine: by docker's own command here, and by ssh."""

import json
import time
import uuid

import pytest

from tests.cli.conftest import command  # noqa: F401
from tests.launch.conftest import SECRET, host, laptop  # noqa: F401
from tests.servers.sshd import sshd  # noqa: F401


@pytest.fixture
def job(docker, volume):
    """The name of a job whose container is removed whatever happens, and what it is launched with."""
    name = f"test-{uuid.uuid4().hex[:10]}"
    # the bucket is a folder of the volume: nothing here has a network
    bucket = {"CLOUD_PROVIDER": "local", "CLOUD_BUCKET": "/workspace/bucket", "CLOUD_ENDPOINT_URL": ""}
    given = ("--name", name, "--gpus", "", "--volume", volume, "--yes", "--preset", "smoke")
    yield name, given, bucket
    docker("rm", "--force", f"wmtp-{name}", check=False)


def state(laptop, name):  # noqa: F811
    return json.loads(laptop.launch("status", name, "--json").stdout)[0]["state"]


@pytest.mark.parametrize("way", ["docker", "ssh"])
def test_a_container_trains_saves_on_a_stop_and_goes_on(
    request,
    laptop,  # noqa: F811
    image,
    job,
    docker,
    inspect,
    tiny_settings,
    way,
):
    name, given, bucket = job
    wanted = (*tiny_settings, "training.max_steps=100000", "checkpoint.every=5", "evaluation.every=0")
    options = (*given, *(part for setting in wanted for part in ("--set", setting)))
    secret = {"HF_TOKEN": "hf_plantedplantedplantedplanted", "MY_TOKEN": SECRET}
    if way == "docker":
        start = ("docker", image, *options, "--option=--network=none", "--env", "MY_TOKEN")
    else:
        found = request.getfixturevalue("host")
        start = ("ssh", found.address, "--image", image, *options, "--env", "MY_TOKEN")
    said = laptop.launch(*start, **bucket, **secret)
    deadline = time.monotonic() + 300
    while "step_5" not in laptop.launch("logs", name).stdout:
        assert time.monotonic() < deadline, laptop.launch("logs", name).stdout
        assert state(laptop, name)["phase"] == "running"
        time.sleep(0.5)

    def every(file):  # of the container's processes; some end, or are just beginning, while it looks
        return docker("exec", f"wmtp-{name}", "sh", "-c", f"cat /proc/*/{file}", check=False).stdout

    told = every("cmdline")
    assert "wmtp" in told
    known = json.dumps(inspect(f"wmtp-{name}"))
    log = laptop.launch("logs", name).stdout
    for planted in (SECRET, secret["HF_TOKEN"]):
        assert planted not in told + known + log + said.stdout + laptop.registered[0].read_text()
        assert planted in every("environ")
    assert "WMTP_RESTART=always" in known
    assert "runs there already" in laptop.launch(*start, code=79, **bucket, **secret).stderr

    # neither the end of its patience nor asking again cuts off the save
    try:
        assert "has not ended in 0 s" in laptop.launch("stop", name, "--grace", 0, code=74).stderr
    except AssertionError:  # the save was quicker than the look at it
        assert state(laptop, name)["phase"] == "ended"
    assert "ended with 75: saved, start me again" in laptop.launch("stop", name).stdout
    if way == "ssh":
        return
    laptop.launch(*start, **bucket, **secret)
    deadline = time.monotonic() + 300
    while "resum" not in laptop.launch("logs", name).stdout.lower():
        assert time.monotonic() < deadline, laptop.launch("logs", name).stdout
        time.sleep(0.5)
    laptop.launch("stop", name)


def test_what_is_wrong_is_said(laptop, engine, job):  # noqa: F811
    _, given, bucket = job
    said = laptop.launch("docker", "wmtp-worker:there-is-none-of-it", *given, code=78, **bucket)
    assert "there is no image wmtp-worker:there-is-none-of-it" in said.stderr
    said = laptop.launch("docker", "wmtp-worker", *given, code=75, **bucket, DOCKER_HOST="unix:///nowhere.sock")
    assert "docker does not answer" in said.stderr
    said = laptop.launch("docker", "wmtp-worker", *given, code=78, **bucket, PATH="/nowhere")
    assert "there is no docker on this machine" in said.stderr


def test_no_gpu_there(laptop, image, job, docker):  # noqa: F811
    name, given, bucket = job
    if "nvidia" in docker("info", "--format", "{{json .Runtimes}}").stdout:
        pytest.skip("this engine has GPUs")
    said = laptop.launch("docker", image, *given, "--gpus", "all", code=78, **bucket)
    assert "docker has no GPUs there" in said.stderr
    assert docker("container", "inspect", f"wmtp-{name}", check=False).returncode != 0
