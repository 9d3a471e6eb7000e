"""Trainings in containers: locked down, stopped, killed, gone on with by others; the volume is all that survives."""

import json
import re

import pytest

# small enough that starting Python takes longer, long enough to be interrupted; the same in every start of the run
EVERY, STEPS = 20, 400
RUN = (
    "--preset=smoke",
    "--run-name=interrupted",
    "--set=model.hidden_size=32",
    "--set=model.intermediate_size=48",
    "--set=model.attention_heads=2",
    "--set=training.micro_batch_size=1",
    f"--set=training.max_steps={STEPS}",
    "--set=evaluation.every=0",
    "--set=evaluation.max_batches=2",
    f"--set=checkpoint.every={EVERY}",
    "--set=checkpoint.lease_seconds=3",
    "--set=host.threads=1",
)


def saved_steps(logs: str) -> list[int]:
    return [int(step) for step in re.findall(r"saved step_(\d+)", logs)]


def published_steps(logs: str) -> list[int]:
    return [int(step) for step in re.findall(r"step_(\d+) is in the bucket", logs)]


@pytest.fixture
def read(image, volume, docker):
    """Run a command where the volume is, and return what it prints."""

    def read(command: str) -> str:
        options = ("--rm", "--network", "none", "--user", "0:0", "--volume", f"{volume}:/workspace")
        found = docker("run", *options, "--entrypoint", "bash", image, "-c", command)
        return str(found.stdout)

    return read


def test_locked_down_smoke_training_turns_healthy_and_ends_well(start, volume, read):
    locked_down = ("--read-only", "--user", "12345:12345", "--memory", "2g", "--cap-drop", "ALL")
    hardened = ("--security-opt", "no-new-privileges", "--pids-limit", "256")
    often = ("--health-interval", "2s")
    options = (*locked_down, *hardened, *often, "--volume", f"{volume}:/workspace")
    container = start("train", "--preset", "smoke", "--set=training.max_steps=20", options=options)
    container.until(lambda: container.health() == "healthy", "health")
    assert container.exit_code() == 0, container.logs()
    found = read("stat -c '%u:%g' checkpoints/*/final.pt && cat checkpoints/*/heartbeat.json")
    owner, heartbeat = found.split("\n", 1)
    assert owner == "12345:12345"
    assert json.loads(heartbeat)["phase"] == "done"
    assert json.loads(heartbeat)["step"] == saved_steps(container.logs())[-1] > 0


def test_run_survives_kill_and_stop_and_ends_as_another_user(start, volume, read, docker):
    options = ("--volume", f"{volume}:/workspace")
    killed = start("train", *RUN, options=options)
    killed.until(lambda: len(saved_steps(killed.logs())) >= 2, "second checkpoint")
    docker("kill", killed.name)
    assert killed.exit_code() == 137
    beat = json.loads(read("cat checkpoints/interrupted/heartbeat.json"))["step"]

    # the way of hosts that replace the entrypoint: a shell, then start.sh
    command = f"exec start.sh --resume {' '.join(RUN)}"
    stopped = start("-c", command, options=(*options, "--entrypoint", "bash"))
    stopped.until(lambda: len(saved_steps(stopped.logs())) >= 1, "checkpoint of the second start")
    resumed = int(re.findall(r"step_(\d+)", stopped.logs())[0])
    assert resumed >= max(saved_steps(killed.logs()))
    assert beat - resumed <= 2 * EVERY  # the newest may just have been under way
    docker("stop", "--time", "30", stopped.name)
    assert stopped.exit_code() == 75, stopped.logs()

    # root is welcome too
    ended = start("train", *RUN, options=(*options, "--user", "0:0"))
    assert ended.exit_code() == 0, ended.logs()
    assert f"step_{saved_steps(stopped.logs())[-1]}" in ended.logs()
    assert saved_steps(ended.logs())[-1] == STEPS
    # every step once, whoever took it
    lines = map(json.loads, read("cat logs/interrupted/metrics.jsonl").splitlines())
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, STEPS + 1))


def test_variables_alone_are_enough_and_the_bucket_is_all_that_survives(start, s3_server):
    variables = s3_server.variables(s3_server.make_bucket())
    options = ("--network", "host", *(f"--env={name}={value}" for name, value in variables.items()))
    killed = start("train", *RUN, options=options)
    # a busy machine may skip one
    killed.until(lambda: len(published_steps(killed.logs())) >= 2, "second published checkpoint")
    published = published_steps(killed.logs())[-1]
    killed.remove()

    ended = start("train", *RUN, options=options)
    assert ended.exit_code() == 0, ended.logs()
    fetched = int(re.findall(r"fetched step_(\d+) from the bucket", ended.logs())[0])
    assert fetched >= published
    assert min(saved_steps(ended.logs())) > fetched
    assert f"resuming from /workspace/checkpoints/interrupted/step_{fetched}" in ended.logs()
