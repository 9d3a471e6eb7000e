"""`docker/compose.tracking.yaml` and the passwords it needs, without an engine."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import yaml

DOCKER = Path(__file__).resolve().parents[2] / "docker"


def test_nginx_is_given_every_variable_of_its_template():
    services = yaml.safe_load((DOCKER / "compose.tracking.yaml").read_text())["services"]
    wanted = set(re.findall(r"\$\{(\w+)\}", (DOCKER / "tracking" / "default.conf.template").read_text()))
    assert wanted == services["nginx"]["environment"].keys()
    assert all(service["healthcheck"]["test"] and service["restart"] for service in services.values())


def test_the_server_has_the_versions_of_the_tests():
    lock = (DOCKER.parent / "requirements" / "mlflow-server.in").read_text()
    pins = re.findall(r"(\S+)==(\S+)", (DOCKER / "tracking" / "Dockerfile").read_text())
    assert {f"{name}=={version}" for name, version in pins if name != "boto3"} <= set(lock.split())


def test_mlflow_may_write_to_its_volume():
    """A new volume takes the owner of what the image has there; root's without."""
    (volume,) = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]["tracking"]["volumes"]
    made = f"install -d -o mlflow -g mlflow {volume.partition(':')[2]}\n"
    assert made in (DOCKER / "tracking" / "Dockerfile").read_text()


def test_passwords_complete_what_is_there(tmp_path):
    shutil.copytree(DOCKER / "tracking", tmp_path / "tracking", ignore=lambda *_: ["htpasswd", "s3.json"])
    (tmp_path / ".env").write_text("NGINX_IMAGE=mine\nCOMPOSE_PROFILES=\nMLFLOW_TRACKING_PASSWORD=mine")
    command = [tmp_path / "tracking" / "passwords.sh", "me"]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=180).stdout
    assert "export MLFLOW_TRACKING_USERNAME=me\n" in told
    assert "export MLFLOW_TRACKING_PASSWORD=mine\n" in told
    lines = (tmp_path / ".env").read_text().splitlines()
    assert lines[:3] == ["NGINX_IMAGE=mine", "COMPOSE_PROFILES=", "MLFLOW_TRACKING_PASSWORD=mine"]
    variables = dict(line.split("=", 1) for line in lines)
    assert len(lines) == len(variables)
    (identity,) = json.loads((tmp_path / "tracking" / "s3.json").read_text())["identities"]
    assert identity["credentials"][0]["secretKey"] == variables["TRACKING_S3_SECRET"] != ""
    assert (tmp_path / "tracking" / "htpasswd").read_text().startswith("me:$6$")


def test_passwords_are_made_once_and_are_nobody_elses(tmp_path):
    shutil.copytree(DOCKER / "tracking", tmp_path / "tracking", ignore=lambda *_: ["htpasswd", "s3.json"])
    script = tmp_path / "tracking" / "passwords.sh"
    first = subprocess.run([script], capture_output=True, text=True, check=True, timeout=180).stdout
    told = dict(line.removeprefix("export ").split("=", 1) for line in first.splitlines())
    variables = dict(line.split("=", 1) for line in (tmp_path / ".env").read_text().splitlines())
    assert told["MLFLOW_TRACKING_PASSWORD"] == variables["MLFLOW_TRACKING_PASSWORD"]
    assert (
        len({variables[name] for name in ("POSTGRES_PASSWORD", "TRACKING_S3_SECRET", "MLFLOW_TRACKING_PASSWORD")}) == 3
    )
    assert (tmp_path / ".env").stat().st_mode & 0o077 == 0
    user, _, hashed = (tmp_path / "tracking" / "htpasswd").read_text().strip().partition(":")
    command = ["openssl", "passwd", "-6", "-salt", hashed.split("$")[2], told["MLFLOW_TRACKING_PASSWORD"]]
    assert (user, hashed) == (
        told["MLFLOW_TRACKING_USERNAME"],
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip(),
    )
    assert subprocess.run([script], capture_output=True, text=True, check=True, timeout=180).stdout == first
