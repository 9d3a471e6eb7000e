"""entrypoint.sh: what becomes of a command, secrets from files, room for caches; on sourced functions."""

import os
import subprocess
from pathlib import Path

import pytest

from wmtp_worker.settings.secrets import SECRET_VARIABLES

ROOT = Path(__file__).resolve().parents[2]
ENTRYPOINT = ROOT / "entrypoint/entrypoint.sh"


@pytest.fixture
def run(tmp_path: Path):
    """Run bash after sourcing entrypoint.sh, where `wmtp` prints what it is given and torch is 2."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "wmtp").write_text('#!/bin/bash\nprintf "<%s>" wmtp "$@"\n')
    (programs / "python3").write_text('#!/bin/bash\necho "${TORCH-2.13.0+cpu}"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    environ = {"PATH": f"{programs}:{os.environ['PATH']}", "HOME": str(tmp_path), "WMTP_IMAGE": "1"}
    environ["WMTP_WORKDIR"] = str(tmp_path / "work")

    def run(script: str, *arguments: str, **more: str):
        return subprocess.run(
            ["bash", "-c", f"source '{ENTRYPOINT}'\n{script}", "entrypoint.sh", *arguments],
            env=environ | more,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=180,
        )

    return run


@pytest.mark.parametrize(
    ("command", "becomes"),
    [
        ([], "<wmtp><train>"),
        (["train"], "<wmtp><train>"),
        (["train", "--preset", "smoke", "--resume"], "<wmtp><train><--preset><smoke><--resume><auto>"),
        (["--preset", "smoke"], "<wmtp><train><--preset><smoke>"),
        (["evaluate", "a run"], "<wmtp><evaluate><a run>"),
        (["checkpoints", "ls", "r", "--json"], "<wmtp><checkpoints><ls><r><--json>"),
        (["report", "mbpp"], "<wmtp><report><mbpp>"),
        (["doctor"], "<wmtp><doctor>"),
        (["assets", "ls"], "<wmtp><assets><ls>"),
        (["sync", "ls", "s3://b"], "<wmtp><sync><ls><s3://b>"),  # not the program of that name
        (["settings", "show"], "<wmtp><settings><show>"),
        (["--version"], "<wmtp><--version>"),
        (["shell", "-c", "echo in a shell"], "in a shell\n"),
        (["wmtp", "train"], "<wmtp><train>"),
        (["echo", "a program"], "a program\n"),
    ],
)
def test_command_becomes(run, command, becomes):
    found = run('_main "$@"', *command)
    assert (found.returncode, found.stdout, found.stderr) == (0, becomes, "")


def test_unknown_command_names_the_known_ones(run):
    found = run('_main "$@"', "trian")
    assert found.returncode == 78
    assert found.stderr.startswith("entrypoint.sh: error: unknown command: trian\n  -> one of train, plan, evaluate,")
    assert found.stderr.endswith(", settings, health, shell, help, or a program of the image\n")


def test_every_command_of_wmtp_is_one_of_the_image(run):
    from typer.main import get_command

    from wmtp_worker.cli.app import app

    found = run('printf "%s\\n" train "${COMMANDS[@]}"; usage').stdout.splitlines()
    commands = sorted(get_command(app).commands)
    assert sorted(found[: len(commands)]) == commands
    for name in (*commands, "health", "shell"):
        assert any(line.startswith(f"  {name} ") for line in found), name


@pytest.mark.parametrize("command", ["help", "--help", "-h"])
def test_help_is_there(run, command):
    found = run('_main "$@"', command)
    assert found.returncode == 0
    assert "\n  train " in found.stdout


@pytest.mark.parametrize(
    ("torch", "code"), [("2.13.0+cu126", 0), ("2.99.1", 0), ("3.0.0", 78), ("1.13.1", 78), ("20.1", 78)]
)
def test_only_torch_2_trains(run, torch, code):
    found = run("_main train", TORCH=torch)
    assert found.returncode == code
    if code:
        assert f"this image has torch {torch}, and wmtp-worker needs torch 2" in found.stderr


def test_secrets_are_the_ones_of_settings(run):
    assert run('printf "%s\\n" "${SECRET_VARIABLES[@]}"').stdout.split() == list(SECRET_VARIABLES)


@pytest.mark.parametrize(
    ("content", "value"),
    [
        ("secret\n", "secret"),
        ("secret", "secret"),
        ("secret\r\n", "secret"),
        ("two\nlines\n\n", "two\nlines\n"),
        (" $(id) `id` 'x' \\n\n", " $(id) `id` 'x' \\n"),
    ],
)
def test_secret_comes_from_its_file_exactly_as_wmtp_reads_it(run, tmp_path, content, value):
    from wmtp_worker.settings.secrets import read_secret_files

    (tmp_path / "secret").write_text(content, newline="")
    found = run('_main bash -c \'printf "%s" "$HF_TOKEN"\'', HF_TOKEN_FILE=str(tmp_path / "secret"))
    assert (found.returncode, found.stdout) == (0, value)
    read = {"HF_TOKEN_FILE": str(tmp_path / "secret")}
    assert read_secret_files(read) == []
    assert read["HF_TOKEN"] == value


@pytest.mark.parametrize(
    ("content", "environ", "what"),
    [
        (None, {}, "cannot be read"),
        ("", {}, "is an empty file"),
        ("one\n", {"HF_TOKEN": "another"}, "both HF_TOKEN and HF_TOKEN_FILE are set"),
    ],
)
def test_wrong_secret_file_is_a_clear_error_without_the_secret(run, tmp_path, content, environ, what):
    if content is not None:
        (tmp_path / "secret").write_text(content)
    found = run("_main doctor", HF_TOKEN_FILE=str(tmp_path / "secret"), **environ)
    assert found.returncode == 78
    assert what in found.stderr
    assert "another" not in found.stderr


def test_secret_given_twice_alike_is_no_contradiction(run, tmp_path):
    (tmp_path / "secret").write_text("same\n")
    assert run("_main doctor", HF_TOKEN_FILE=str(tmp_path / "secret"), HF_TOKEN="same").returncode == 0


def test_caches_go_to_the_volume_and_own_choices_stay(run, tmp_path):
    words = "_main bash -c 'echo \"$XDG_CACHE_HOME $TRITON_CACHE_DIR $HOME\"'"
    room = tmp_path / "work/.cache"
    assert run(words).stdout == f"{room} {room}/triton {tmp_path}\n"
    assert run(words, TRITON_CACHE_DIR="/mine").stdout == f"{room} /mine {tmp_path}\n"


def test_health_follows_the_newest_heartbeat(run, tmp_path):
    runs = tmp_path / "work/checkpoints"
    found = run("_main health")
    assert (found.returncode, found.stdout) == (1, f"no heartbeat under {runs}\n")

    now = int(run("echo $EPOCHSECONDS").stdout)
    for name, age in (("old", 10_000), ("young run", 5)):
        (runs / name).mkdir(parents=True)
        (runs / name / "heartbeat.json").write_text(f'{{"time": {now - age}.25, "phase": "train", "step": 3}}')
    found = run("_main health")
    assert found.returncode == 0
    assert found.stdout.endswith(" s ago, of run young run\n")

    (runs / "young run/heartbeat.json").write_text(f'{{"phase":"train","time":{now - 121}}}')
    assert run("_main health").returncode == 1
    (runs / "young run/heartbeat.json").write_text("{")
    assert run("_main health").returncode == 1
