"""The image, built once from the project's own Dockerfile, and this machine's Docker engine, by its own command."""

import json
import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
# planted where a build could pick it up; must be nowhere in the image
CANARY = "canary-7f3d9a51c2"
LABELS = {"VERSION": "1.2.3", "REVISION": "abcdef0", "CREATED": "2026-01-02T03:04:05Z", "SOURCE": "somewhere"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.container)
            # one worker builds the image for all of them
            item.add_marker(pytest.mark.xdist_group("container"))
            # the first of them waits for the image, perhaps for its base
            item.add_marker(pytest.mark.timeout(3600))


def run_docker(
    *arguments: str, timeout: float = 300, check: bool = True, **options: Any
) -> subprocess.CompletedProcess[str]:
    found = subprocess.run(
        ["docker", *arguments], capture_output=True, text=True, timeout=timeout, check=False, **options
    )
    if check and found.returncode != 0:
        raise AssertionError(f"docker {' '.join(arguments)}: {found.returncode}\n{found.stdout}{found.stderr}")
    return found


def look_at(name: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = json.loads(run_docker("inspect", name).stdout)
    return found[0]


class Container:
    """A container that was started in the background, and is removed whatever happens."""

    def __init__(self, image: str, *command: str, options: tuple[str, ...] = ()) -> None:
        self.name = f"wmtp-test-{uuid.uuid4().hex[:12]}"
        network = () if "--network" in options else ("--network", "none")
        run_docker("run", "--detach", "--name", self.name, *network, *options, image, *command)

    def logs(self) -> str:
        found = run_docker("logs", self.name)
        return found.stdout + found.stderr

    def until(self, done: Callable[[], Any], what: str, timeout: float = 600) -> Any:
        """Wait until `done()` is true; the container must be running until then."""
        deadline = time.monotonic() + timeout
        while not (found := done()):
            state = look_at(self.name)["State"]
            assert state["Running"], f"ended with {state['ExitCode']} before {what}:\n{self.logs()}"
            assert time.monotonic() < deadline, f"no {what} in {timeout} s:\n{self.logs()}"
            time.sleep(0.25)
        return found

    def health(self) -> str:
        status: str = look_at(self.name)["State"]["Health"]["Status"]
        return status

    def remove(self) -> None:
        """End it at once, and its own volumes with it."""
        run_docker("rm", "--force", "--volumes", self.name, check=False)

    def exit_code(self, timeout: float = 600) -> int:
        return int(run_docker("wait", self.name, timeout=timeout).stdout)


@pytest.fixture(scope="session")
def engine() -> None:
    """A Docker engine that answers; a visible skip without one, unless WMTP_REQUIRE_CONTAINERS=1."""
    missing = "no docker command"
    if shutil.which("docker"):
        answer = run_docker("info", "--format", "{{.ServerVersion}}", check=False)
        if answer.returncode == 0:
            return
        missing = answer.stderr.strip() or "no Docker engine answers"
    if os.environ.get("WMTP_REQUIRE_CONTAINERS") == "1":
        pytest.fail(f"WMTP_REQUIRE_CONTAINERS=1, but: {missing}")
    pytest.skip(missing)


@pytest.fixture(scope="session")
def docker(engine: None) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command: `docker("run", …, timeout=…, check=…)`."""
    return run_docker


@pytest.fixture(scope="session")
def inspect(engine: None) -> Callable[[str], dict[str, Any]]:
    return look_at


@pytest.fixture(scope="session")
def canary() -> str:
    return CANARY


@pytest.fixture(scope="session")
def labels() -> dict[str, str]:
    """What the image's labels were built with."""
    return LABELS


@pytest.fixture(scope="session")
def build(engine: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Build the project's Dockerfile in a copy of the checkout where secrets lie about."""
    context = tmp_path_factory.mktemp("context") / "checkout"
    ignored = shutil.ignore_patterns(
        ".git", ".venv", ".cache", ".*_cache", "__pycache__", "work", "dist", "build", "*.egg-info", ".hypothesis"
    )
    shutil.copytree(ROOT, context, ignore=ignored)
    for place in (context, context / "wmtp_worker", context / "configs", context / "entrypoint"):
        (place / ".env").write_text(f"AWS_SECRET_ACCESS_KEY={CANARY}\n")
        (place / ".env.production").write_text(f"HF_TOKEN={CANARY}\n")
    (context / "work").mkdir()
    (context / "work/notes.txt").write_text(CANARY)

    def build(*arguments: str, base: str | None = os.environ.get("WMTP_BASE_IMAGE")) -> Any:
        base_argument = ("--build-arg", f"BASE_IMAGE={base}") if base else ()
        environ = os.environ | {"AWS_SECRET_ACCESS_KEY": CANARY, "DOCKER_BUILDKIT": "1"}
        command = ("build", *base_argument, *arguments, str(context))
        return run_docker(*command, timeout=3000, check=False, env=environ)

    return build


@pytest.fixture(scope="session")
def image(build: Callable[..., subprocess.CompletedProcess[str]]) -> Iterator[str]:
    name = "wmtp-worker:test"
    labels = [word for key, value in LABELS.items() for word in ("--build-arg", f"{key}={value}")]
    found = build("--tag", name, *labels)
    assert found.returncode == 0, found.stderr[-5000:]
    yield name
    run_docker("rmi", "--force", name, check=False)  # the next build takes its layers from the build's cache


@pytest.fixture
def start(image: str, volume: str) -> Iterator[Callable[..., Container]]:
    """Start a container of the image: `start("train", …, options=("--memory", "2g"))`.

    It asks for the volume so as to be torn down before it: a volume in use cannot be removed.
    """
    containers = []

    def start(*command: str, options: tuple[str, ...] = ()) -> Container:
        containers.append(Container(image, *command, options=options))
        return containers[-1]

    yield start
    for container in containers:
        container.remove()


@pytest.fixture
def volume(engine: None) -> Iterator[str]:
    name = f"wmtp-test-{uuid.uuid4().hex[:12]}"
    run_docker("volume", "create", name)
    yield name
    run_docker("volume", "rm", "--force", name, check=False)
