"""What is in the image, what is not, and how it answers to wrong use."""

import io
import json
import re
import subprocess
import tarfile
from pathlib import Path

import pytest


def test_labels_user_and_way_in(image, inspect, labels):
    config = inspect(image)["Config"]
    found = {key.removeprefix("org.opencontainers.image."): value for key, value in config["Labels"].items()}
    assert {key: found[key.lower()] for key in labels} == labels
    assert found["licenses"] == "MIT"
    assert found["base.name"]
    assert config["User"] == "1000:1000"
    assert config["Entrypoint"][0] == "tini"
    assert config["Cmd"] == ["train"]
    assert config["WorkingDir"] == "/workspace"
    assert list(config["Volumes"]) == ["/workspace"]


def own_layers(image: str, docker, inspect, tmp_path: Path):
    """Every file of the layers that the Dockerfile adds to its base: (path, content)."""
    base = inspect(image)["Config"]["Labels"]["org.opencontainers.image.base.name"]
    of_the_base = len(inspect(base)["RootFS"]["Layers"])
    archive = tmp_path / "image.tar"
    docker("save", "--output", str(archive), image, timeout=900)
    with tarfile.open(archive) as saved:
        manifest = saved.extractfile("manifest.json")
        assert manifest is not None
        layers = json.load(manifest)[0]["Layers"][of_the_base:]
        assert layers
        for layer in layers:
            content = saved.extractfile(layer)
            assert content is not None
            with tarfile.open(fileobj=content) as files:
                for member in files:
                    file = files.extractfile(member) if member.isfile() else None
                    yield member.name, file.read() if file else b""


def test_no_secret_and_no_cache_in_any_layer(image, docker, inspect, canary, tmp_path):
    assert canary not in docker("history", "--no-trunc", image).stdout
    assert canary not in json.dumps(inspect(image))
    names = []  # whiteouts (.wh.) tell that something of the base is gone
    for name, content in own_layers(image, docker, inspect, tmp_path):
        assert canary.encode() not in content, name
        names.append(name)
    # they were really read
    assert "opt/wmtp/entrypoint/entrypoint.sh" in names
    assert any(name.endswith("wmtp_worker/configs/defaults.yaml") for name in names)
    unwanted = re.compile(
        r"(^|/)\.env|\.cache/|var/lib/apt/lists/(?!\.wh\.).|var/cache/apt/.*\.(deb|bin)$|\.whl$|^tmp/.|^source/"
    )
    assert [name for name in names if unwanted.search(name)] == []


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        (("help",), 0, "docker run"),
        (("--version",), 0, "0."),
        (("doctor",), 0, "torch"),
        (("python", "-c", "import os; print(os.getuid(), os.getgid())"), 0, "1000 1000"),
        (("trian",), 78, "unknown command: trian\n  -> one of train, plan, evaluate,"),
        (("train", "--set", "training.lrate=1"), 78, "training.lr"),
        (("train", "--preset", "smok"), 78, "smoke"),
        (("--run-name", "../x"), 78, "../x"),
        (("health",), 1, "no heartbeat under /workspace/checkpoints"),
    ],
)
def test_command(image, docker, command, code, words):
    found = docker("run", "--rm", "--network", "none", image, *command, check=False)
    assert found.returncode == code, found.stderr
    assert words in found.stdout + found.stderr


def test_work_directory_that_cannot_be_written_is_a_clear_error(image, docker):
    options = ("--rm", "--network", "none", "--read-only", "--env", "WMTP_WORKDIR=/nowhere")
    found = docker("run", *options, image, "train", "--preset", "smoke", check=False)
    assert found.returncode == 78, found.stderr
    assert "/nowhere" in found.stderr
    assert "Traceback" not in found.stderr


@pytest.fixture(scope="module")
def base_with_torch_3(image, docker, inspect):
    """The image's base, with the metadata of another torch in front of the one it has."""
    base = inspect(image)["Config"]["Labels"]["org.opencontainers.image.base.name"]
    dockerfile = f"""
FROM {base}
RUN folder=$(python3 -c 'import importlib.metadata as m; print(m.distribution("torch").locate_file(""))') \\
    && rm -rf "$folder"/torch-*.dist-info && mkdir "$folder/torch-3.0.0.dist-info" \\
    && printf 'Metadata-Version: 2.1\\nName: torch\\nVersion: 3.0.0\\n' >"$folder/torch-3.0.0.dist-info/METADATA"
"""
    name = "wmtp-worker-test-base:torch3"
    docker("build", "--tag", name, "-", input=dockerfile, timeout=900)
    yield name
    docker("rmi", "--force", name, check=False)


def test_build_on_another_torch_major_version_is_refused(build, base_with_torch_3):
    found: subprocess.CompletedProcess[str] = build("--target", "environment", base=base_with_torch_3)
    assert found.returncode != 0
    assert "BASE_IMAGE has torch 3.0.0, and torch 2 is needed" in found.stderr


def test_start_with_another_torch_major_version_is_refused(image, docker):
    # as if somebody had installed another torch into a derived image
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as files:
        metadata = b"Metadata-Version: 2.1\nName: torch\nVersion: 3.1.0\n"
        member = tarfile.TarInfo("stub/torch-3.1.0.dist-info/METADATA")
        member.size = len(metadata)
        files.addfile(member, io.BytesIO(metadata))
    container = docker("create", "--env", "PYTHONPATH=/stub", image, "train", "--preset", "smoke").stdout.strip()
    try:
        command = ["docker", "cp", "-", f"{container}:/"]
        subprocess.run(command, input=archive.getvalue(), check=True, capture_output=True, timeout=180)
        found = docker("start", "--attach", container, check=False)
        assert found.returncode == 78
        assert "this image has torch 3.1.0, and wmtp-worker needs torch 2\n  -> build it" in found.stderr
    finally:
        docker("rm", "--force", "--volumes", container, check=False)


def test_secret_from_a_file_reaches_a_program(image, docker, canary, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text(f"{canary}\n")
    secret.chmod(0o444)
    options = ("--rm", "--volume", f"{secret}:/run/secrets/token:ro", "--env", "HF_TOKEN_FILE=/run/secrets/token")
    found = docker("run", *options, image, "bash", "-c", 'echo "$HF_TOKEN"')
    assert found.stdout == f"{canary}\n"


def test_limits_of_the_container_are_those_of_the_worker(image, docker):
    options = ("--network", "none", "--cpus", "1", "--memory", "1g", "--pids-limit", "150")
    torch = "from wmtp_worker.host.device import set_threads; print(set_threads(0))"
    command = f"wmtp doctor --quick --json >&2; exec python -c '{torch}'"
    found = docker("run", "--rm", *options, image, "bash", "-c", command)
    checks = {check["name"]: (check["status"], check["found"]) for check in json.loads(found.stderr)["checks"]}
    assert re.fullmatch(r"1 of \d+ cores", checks["cpu"][1])
    assert checks["memory"] == ("warn", "1.0 GiB")
    assert re.fullmatch(r"\d+ of 150 processes and threads", checks["processes"][1])
    assert found.stdout == "1\n"
