"""The image on a host: its layers, from its start to the first step, pulling at boot, from a notice to a safe save.

    docker build -t wmtp-worker .
    python benchmarks/image.py [--image wmtp-worker] [--rounds N]

The bucket is a SeaweedFS on loopback, which the container reaches by `--network host`. "Cold" is after the kernel has
dropped its cache of files, where this process may ask for that.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import median, record
from transfer import running

RUN = "measured"
LIMIT = 600.0
MEGABYTES = 1024  # that are pulled at boot
SMOKE = {"WMTP_PRESET": "smoke", "WMTP_RUN_NAME": RUN, "WMTP_LOGGING__EVERY": "1", "WMTP_EVALUATION__EVERY": "0"}
# the only save is the one that the notice asks for
NEVER = {"WMTP_CHECKPOINT__EVERY": "100000", "WMTP_TRAINING__MAX_STEPS": "100000"}
STATES = {
    "smoke": {},
    "larger": {
        "WMTP_MODEL__HIDDEN_SIZE": "512",
        "WMTP_MODEL__INTERMEDIATE_SIZE": "1376",
        "WMTP_MODEL__LAYERS": "5",
        "WMTP_MODEL__ATTENTION_HEADS": "8",
    },
}
# seconds between notice and end: docs/doctor.md has the sources
NOTICES = {"EC2 spot": 120, "Google spot, Azure spot, Kubernetes' default": 30, "docker stop's default": 10}


def docker(*arguments: str) -> str:
    return subprocess.run(["docker", *arguments], check=True, capture_output=True, text=True, timeout=LIMIT).stdout


def layers(image: str) -> dict[str, Any]:
    """Megabytes of what the Dockerfile adds to its base, by instruction, and of the base."""

    def history(name: str) -> list[dict[str, str]]:
        lines = docker("history", "--no-trunc", "--human=false", "--format", "{{json .}}", name).splitlines()
        return [json.loads(line) for line in lines]

    labels = json.loads(docker("inspect", image))[0]["Config"]["Labels"]
    base = labels["org.opencontainers.image.base.name"]
    below = history(base)
    own = history(image)[: -len(below)]
    added = [
        {"megabytes": round(int(layer["Size"]) / 1e6, 1), "by": " ".join(layer["CreatedBy"].split())[:90]}
        for layer in own
        if int(layer["Size"])
    ]
    under = round(sum(int(layer["Size"]) for layer in below) / 1e6, 1)
    return {"base": base, "base megabytes": under, "added": added}


@contextmanager
def container(image: str, variables: dict[str, str], *command: str) -> Iterator[str]:
    """A detached container's name; it is gone afterwards. Variables go by the environment, not by arguments."""
    name = f"wmtp-measured-{uuid.uuid4().hex[:8]}"
    names = [f"--env={variable}" for variable in variables]
    subprocess.run(
        ["docker", "run", "--detach", "--name", name, "--network", "host", *names, image, *command],
        check=True, capture_output=True, timeout=LIMIT, env={**os.environ, **variables},
    )  # fmt: skip
    try:
        yield name
    finally:
        subprocess.run(["docker", "rm", "--force", "--volumes", name], capture_output=True, timeout=LIMIT)


def until(name: str, words: str) -> None:
    """Wait until the container has said that."""
    end = time.monotonic() + LIMIT
    while words not in (said := _logs(name)):
        if time.monotonic() > end or docker("inspect", "--format", "{{.State.Running}}", name).strip() != "true":
            sys.exit(f"it never said {words!r}:\n{said[-3000:]}")
        time.sleep(0.1)


def _logs(name: str) -> str:
    found = subprocess.run(["docker", "logs", name], capture_output=True, text=True, timeout=LIMIT)
    return found.stdout + found.stderr


def first_step(image: str) -> float:
    started = time.perf_counter()
    with container(image, SMOKE | NEVER, "train") as name:
        until(name, "step 1/")
        return time.perf_counter() - started


def drop_caches() -> bool:
    """Whether the kernel did."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def pulling(image: str, cloud: dict[str, str], endpoint: str, rounds: int, put: Callable[..., Any]) -> dict[str, Any]:
    """Seconds of a pull in a container of its own, and of one plain GET of the same bytes into a file."""
    put(Key="big/weights.bin", Body=os.urandom(MEGABYTES << 20))
    url = f"{endpoint}/{cloud['CLOUD_BUCKET']}/big/weights.bin"
    pulls, gets, starts = [], [], []
    for _ in range(rounds):
        started = time.perf_counter()
        with container(image, cloud, "sync", "pull", f"s3://{cloud['CLOUD_BUCKET']}/big", "/workspace/big") as name:
            if (code := docker("wait", name).strip()) != "0":
                sys.exit(f"the pull ended with {code}:\n{_logs(name)}")
            pulls.append(time.perf_counter() - started)
        started = time.perf_counter()
        with container(image, cloud, "sync", "--help") as name:
            docker("wait", name)
            starts.append(time.perf_counter() - started)
        gets.append(_plain_get(url, cloud))
    return {
        "megabytes": MEGABYTES,
        "container, pull, checked": median(pulls),
        "container that does nothing": median(starts),
        "one plain GET": median(gets),
        "share of its speed": round(median(gets) / (median(pulls) - median(starts)), 2),
    }


def _plain_get(url: str, cloud: dict[str, str]) -> float:
    from botocore.auth import S3SigV4QueryAuth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    request = AWSRequest("GET", url)
    keys = Credentials(cloud["AWS_ACCESS_KEY_ID"], cloud["AWS_SECRET_ACCESS_KEY"])
    S3SigV4QueryAuth(keys, "s3", "us-east-1", expires=600).add_auth(request)
    with tempfile.TemporaryFile() as file:
        started = time.perf_counter()
        with urllib.request.urlopen(request.url, timeout=LIMIT) as answer:
            shutil.copyfileobj(answer, file, 1 << 20)
        return time.perf_counter() - started


def notice(image: str, cloud: dict[str, str], state: str, sizes: Callable[[str], int]) -> dict[str, float]:
    """From SIGTERM to the end of the container, which is that of its save's publishing."""
    prefix = f"notice-{uuid.uuid4().hex[:6]}"
    grace = {"WMTP_STOP_GRACE_SECONDS": "120", "CLOUD_PREFIX": prefix}
    with container(image, SMOKE | NEVER | STATES[state] | cloud | grace, "train") as name:
        until(name, "step 3/")
        started = time.perf_counter()
        docker("stop", "--time", "130", name)
        seconds = time.perf_counter() - started
        code = docker("inspect", "--format", "{{.State.ExitCode}}", name).strip()
        if code != "75":
            sys.exit(f"it ended with {code}:\n{_logs(name)[-3000:]}")
    return {"seconds": seconds, "megabytes": round(sizes(f"{prefix}/checkpoints/") / 1e6, 1)}


def notices(image: str, cloud: dict[str, str], rounds: int, sizes: Callable[[str], int]) -> dict[str, Any]:
    """By state; what each notice suffices for follows from the line through both."""
    found = {}
    for state in STATES:
        each = [notice(image, cloud, state, sizes) for _ in range(rounds)]
        found[state] = {"seconds": median([one["seconds"] for one in each]), "megabytes": each[0]["megabytes"]}
    small, large = found["smoke"], found["larger"]
    rate = (large["megabytes"] - small["megabytes"]) / (large["seconds"] - small["seconds"])
    fixed = small["seconds"] - small["megabytes"] / rate
    enough = {host: f"{max(0.0, (seconds - fixed) * rate / 1e3):.1f} GB" for host, seconds in NOTICES.items()}
    return {"by state": found, "megabytes a second": round(rate, 1), "suffices for, at this rate": enough}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", default="wmtp-worker")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    image, rounds = options.image, options.rounds
    result: dict[str, Any] = {"layers": layers(image)}
    first_step(image)
    steps = {"warm": median([first_step(image) for _ in range(rounds)])}
    if drop_caches():
        steps["cold"] = round(first_step(image), 2)
    result["seconds to the first step"] = steps
    with tempfile.TemporaryDirectory() as folder, running(Path(folder)) as server:
        bucket = server.make_bucket()
        client = server.client()

        def sizes(prefix: str) -> int:
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
            return sum(item["Size"] for page in pages for item in page.get("Contents", []))

        cloud = {
            "CLOUD_PROVIDER": "s3",
            "CLOUD_BUCKET": bucket,
            "CLOUD_ENDPOINT_URL": server.endpoint,
            **{name: value for name, value in server.environ.items() if name.startswith("AWS_") and "FILE" not in name},
        }
        put = lambda **given: client.put_object(Bucket=bucket, **given)  # noqa: E731
        result["pulling at boot"] = pulling(image, cloud, server.endpoint, rounds, put)
        result["from SIGTERM to a published save"] = notices(image, cloud, rounds, sizes)
    record("image", result)


if __name__ == "__main__":
    main()
