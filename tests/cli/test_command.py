"""The real command: exit codes, messages, and how quickly it is there."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

import wmtp_worker

# the real `main` with one more command, whose body is the argument
CRASHING = """
import sys
from wmtp_worker.cli import main
from wmtp_worker.cli.app import app

@app.command()
def crash():
    exec(sys.argv[2])

sys.exit(main(["crash"]))
"""


def surroundings(**environ):
    # PYTHONUNBUFFERED would have print itself fail where a pipe is closed
    ours = ("WMTP_", "CLOUD_", "PYTHONUNBUFFERED")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return kept | {"WMTP_ENV_FILE": os.devnull, "COLUMNS": "200"} | environ


@pytest.fixture
def wmtp(tmp_path):
    def run(*arguments, python=("-m", "wmtp_worker"), **environ):
        return subprocess.run(
            [sys.executable, *python, *arguments],
            capture_output=True,
            text=True,
            timeout=180,
            cwd=tmp_path,
            env=surroundings(**environ),
        )

    return run


@pytest.fixture
def crash(wmtp):
    return lambda body, **environ: wmtp("crash", body, python=("-c", CRASHING), **environ)


def test_version(wmtp):
    done = wmtp("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"wmtp {wmtp_worker.__version__}\n", "")


def test_help_names_every_command_and_imports_nothing_heavy(wmtp):
    code = (
        "import sys; from wmtp_worker.cli import main; code = main(['--help']);"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'jinja2', 'yaml', 'sqlite3', 'huggingface_hub'};"
        "heavy &= set(sys.modules);"
        "print('heavy:', heavy or None); sys.exit(code)"
    )
    done = wmtp(python=("-c", code))
    assert done.returncode == 0
    assert "heavy: None" in done.stdout
    for command in ("train", "evaluate", "report", "checkpoints", "assets", "sync", "doctor", "settings"):
        assert f" {command} " in done.stdout


def test_help_is_there_at_once(wmtp):
    # the quickest of a few: this machine may be busy
    def once():
        started = time.perf_counter()
        assert wmtp("--help").returncode == 0
        return time.perf_counter() - started

    assert min(once() for _ in range(3)) < 5.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], ["No such command 'trian'", "Usage: wmtp", "Try 'wmtp --help'."]),
        (["train", "--presett", "smoke"], ["No such option: --presett", "Usage: wmtp train"]),
        (["checkpoints", "ls"], ["Missing argument", "Usage: wmtp checkpoints ls"]),
        (["train", "--preset", "smok"], ["error: unknown preset 'smok'", "did you mean smoke?"]),
        (["train", "--set", "lr"], ["error: --set lr has no value"]),
        (["train", "--run-name", "../x"], ["error: run.name='../x' is no name for a run (from --run-name ../x)"]),
    ],
)
def test_wrong_usage_ends_with_78_and_a_hint(wmtp, arguments, words):
    done = wmtp(*arguments)
    assert (done.returncode, done.stdout) == (78, "")
    for word in words:
        assert word in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [[], ["settings"], ["checkpoints"]])
def test_no_command_shows_the_help_and_ends_with_78(wmtp, arguments):
    done = wmtp(*arguments)
    assert (done.returncode, done.stderr) == (78, "")
    assert "Usage: wmtp" in done.stdout


def test_a_bug_shows_a_traceback_without_secrets_and_ends_with_70(crash):
    done = crash("import os; raise KeyError(os.environ['HF_TOKEN'])", HF_TOKEN="p1anted-s3cret")
    assert done.returncode == 70
    assert "Traceback" in done.stderr
    assert "KeyError: '***'" in done.stderr
    assert done.stderr.endswith("wmtp: this is a bug of ours; please report it with the lines above\n")
    assert "p1anted" not in done.stderr


def test_a_bug_does_not_write_to_the_terminal_what_others_said(crash):
    done = crash(r"raise ValueError('\x1b[2J said the server')")
    assert r"ValueError: \x1b[2J said the server" in done.stderr
    assert "\x1b" not in done.stderr


@pytest.mark.parametrize(
    ("kind", "code", "start"),
    [
        ("InputError", 78, "error: "),
        ("RunHeldError", 79, "error: "),
        ("NotSafeError", 74, "error: "),
        ("Interrupted", 75, "wmtp: "),
    ],
)
def test_an_error_becomes_one_line_and_its_exit_code(crash, kind, code, start):
    body = f"from wmtp_worker.errors import *; raise {kind}('it says p1anted-s3cret', where='a.py:1', fix='do it')"
    done = crash(body, MY_PASSWORD="p1anted-s3cret")
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr == f"{start}it says *** (from a.py:1) -> do it\n"


def test_on_a_terminal_the_word_stands_out_and_brackets_stay():
    ours, theirs = os.openpty()
    body = "from wmtp_worker.errors import *; raise InputError('model.path=[bold] is long ' + 'x' * 200)"
    command = [sys.executable, "-c", CRASHING, "crash", body]
    done = subprocess.run(command, stderr=theirs, timeout=180, env=surroundings(TERM="xterm", NO_COLOR=""))
    os.close(theirs)
    shown = os.read(ours, 10_000).decode()
    os.close(ours)
    assert done.returncode == 78
    assert shown.startswith("\x1b[")
    assert f"model.path=[bold] is long {'x' * 200}\r\n" in shown


def test_a_full_disk_is_no_bug(crash):
    done = crash("f = open('/dev/full', 'w'); f.write('x'); f.flush()")
    assert done.returncode == 78
    assert "No space left on device" in done.stderr
    assert "WMTP_WORKDIR" in done.stderr


@pytest.mark.parametrize(
    "body",
    [
        "import torch; torch.empty(1 << 60)",
        "raise MemoryError",
        "raise RuntimeError('CUDA out of memory. Tried to allocate 2.00 GiB.')",
    ],
)
def test_too_little_memory_is_no_bug(crash, body):
    done = crash(body)
    assert done.returncode == 78
    assert done.stderr.startswith("error: out of memory: ")
    assert "training.micro_batch_size" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_change_nothing_and_lend_no_file_their_number(closed, tmp_path):
    code = (
        "import os, sys; from wmtp_worker.cli import main; code = main(['settings', 'show']);"
        "sys.exit(code or os.open(os.devnull, os.O_RDONLY) <= 2)"
    )
    shell = ["sh", "-c", f'"$0" -c "$1" {closed}', sys.executable, code]
    assert subprocess.run(shell, cwd=tmp_path, env=surroundings(), timeout=180).returncode == 0


def test_a_stream_that_lacks_a_character_shows_its_number(wmtp):
    done = wmtp("--help", PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert r"WMTP_WORKDIR, \u2026" in done.stdout


def test_a_command_chooses_its_exit_code(crash):
    assert crash("import typer; raise typer.Exit(79)").returncode == 79


def with_closed_pipe(stream, *command):
    reader, writer = os.pipe()
    os.close(reader)
    other = "stderr" if stream == "stdout" else "stdout"
    try:
        return subprocess.run(
            [sys.executable, *command],
            **{stream: writer, other: subprocess.PIPE},
            text=True,
            timeout=180,
            env=surroundings(),
        )
    finally:
        os.close(writer)


@pytest.mark.parametrize("command", [["settings", "show"], ["--version"], ["--help"]])
def test_a_reader_that_has_gone_is_no_error_to_talk_about(command):
    done = with_closed_pipe("stdout", "-m", "wmtp_worker", *command)
    assert (done.returncode, done.stderr) == (141, "")


def test_an_error_keeps_its_exit_code_when_nobody_listens():
    assert with_closed_pipe("stderr", "-m", "wmtp_worker", "train", "--preset", "x").returncode == 78
    body = "print('x'); from wmtp_worker.errors import *; raise Interrupted('stopped')"
    assert with_closed_pipe("stdout", "-c", CRASHING, "crash", body).returncode == 75
    assert with_closed_pipe("stderr", "-c", CRASHING, "crash", body).returncode == 75


def test_a_signal_while_modules_load_is_not_lost(tmp_path):
    # doctor polls between its checks, and its second one imports torch
    command = [sys.executable, "-m", "wmtp_worker", "doctor", "--set", f"run.workdir={tmp_path}"]
    environ = surroundings(PYTHONUNBUFFERED="1")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ)
    assert "python" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 75
    assert "stopped by SIGTERM" in err


def test_settings_show_as_json(wmtp):
    done = wmtp("settings", "show", "--preset", "smoke", "--set", "training.lr=1e-4", "--json", WMTP_RUN_NAME="first")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["settings"]["training.lr"] == {"value": 1e-4, "source": "--set training.lr=1e-4"}
    assert report["settings"]["run.name"] == {"value": "first", "source": "variable WMTP_RUN_NAME"}
    assert report["settings"]["training.max_steps"]["value"] == 50
    assert report["settings"]["training.max_steps"]["source"].split("/")[-1].startswith("preset.smoke.yaml:")
    assert len(report["digest"]) == 64


def test_settings_show_for_people_hides_secrets(wmtp):
    url = "https://me:p1anted@host/model"
    done = wmtp(
        "settings",
        "show",
        "--set",
        f"model.path={url}",
        "--set",
        "data.dataset=s3cret-in-env",
        MY_TOKEN="s3cret-in-env",
    )
    assert done.returncode == 0
    assert "p1anted" not in done.stdout
    assert "s3cret-in-env" not in done.stdout
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line.startswith(("model.p", "data.d")))
    assert lines["model.path"].startswith("https://***@host/model")
    assert lines["data.dataset"].startswith("***")


def test_doctor_as_json(wmtp, tmp_path):
    done = wmtp("doctor", "--preset", "smoke", "--quick", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["ok"]
    assert {check["name"] for check in report["checks"]} >= {"python", "torch", "work directory", "clock"}
    assert set(report["checks"][0]) == {"name", "status", "found", "advice", "seconds"}


def test_doctor_is_quick_and_does_without_torch(wmtp):
    code = (
        "import sys; from wmtp_worker.cli import main; code = main(['doctor', '--quick']);"
        "print('heavy:', {'torch', 'transformers', 'boto3', 'obstore', 'mlflow'} & set(sys.modules)); sys.exit(code)"
    )
    done = wmtp(python=("-c", code))
    assert (done.returncode, done.stderr) == (0, "")
    assert "heavy: set()" in done.stdout


def test_doctor_on_a_terminal_is_a_table(tmp_path):
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "wmtp_worker", "doctor", "--quick", "--set", f"run.workdir={tmp_path}"]
    environ = surroundings(TERM="xterm", NO_COLOR="", COLUMNS="60")
    subprocess.run(command, stdout=theirs, timeout=180, check=True, env=environ)
    os.close(theirs)
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert "\x1b[32mpass" in shown
    assert "packaged files" in shown
    assert max(len(line) for line in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown).splitlines()) <= 60


def test_doctor_ends_with_78_if_a_check_fails(wmtp, tmp_path):
    (tmp_path / "file").write_text("")
    done = wmtp("doctor", "--quick", WMTP_WORKDIR=str(tmp_path / "file/work"))
    assert done.returncode == 78
    assert [line.split()[1:3] for line in done.stdout.splitlines() if line.startswith("fail")] == [
        ["work", "directory"]
    ]
    assert "set WMTP_WORKDIR" in done.stdout
