"""start.sh and lib.sh: arguments, the environment's stamp and lock, signals; by bash itself on sourced functions."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
START = ROOT / "entrypoint/start.sh"
# a user's own settings must not decide a test
ENVIRON = {k: v for k, v in os.environ.items() if not k.startswith(("WMTP_", "CLOUD_"))}


def bash(script: str, *arguments: str, cwd: Path = ROOT, timeout: float = 180, **environ: str):
    """Run `script` after sourcing start.sh."""
    return subprocess.run(
        ["bash", "-c", f"source '{START}'\n{script}", "start.sh", *arguments],
        cwd=cwd,
        env=ENVIRON | environ,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """As much of a checkout as start.sh reads."""
    root = tmp_path / "a checkout"
    for part in ("entrypoint", "requirements"):
        shutil.copytree(ROOT / part, root / part)
    shutil.copy(ROOT / "pyproject.toml", root)
    return root


@pytest.fixture
def ready(checkout: Path) -> Path:
    """A checkout whose environment is ready; its `wmtp` prints what it is given."""
    venv = checkout / ".venv"
    (venv / "bin").mkdir(parents=True)
    shutil.copy("/bin/true", venv / "bin/python")
    (venv / "bin/wmtp").write_text(
        '#!/bin/bash\n[[ $1 != doctor ]] || exit 0\nprintf "<%s>" "$@"; echo " ${WMTP_ENV_FILE-}"\n'
    )
    (venv / "bin/wmtp").chmod(0o755)
    script = f"source '{checkout}/entrypoint/lib.sh'; fingerprint runtime >'{venv}/.wmtp-runtime'"
    subprocess.run(["bash", "-c", script], check=True, timeout=60)
    return checkout


def start(checkout: Path, *arguments: str, cwd: Path | None = None, **environ: str):
    return subprocess.run(
        ["bash", str(checkout / "entrypoint/start.sh"), *arguments],
        cwd=cwd or checkout,
        env=ENVIRON | environ,
        capture_output=True,
        text=True,
        timeout=180,
    )


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ([], []),
        (["--preset", "smoke"], ["--preset", "smoke"]),
        (["--resume"], ["--resume", "auto"]),
        (["--resume", "--preset", "smoke"], ["--resume", "auto", "--preset", "smoke"]),
        (["--preset", "smoke", "--resume"], ["--preset", "smoke", "--resume", "auto"]),
        (["--resume", "never"], ["--resume", "never"]),
        (["--resume", "100", "--set", "a=b"], ["--resume", "100", "--set", "a=b"]),
        (["--resume=20"], ["--resume=20"]),
        (["--resume", ""], ["--resume", ""]),
        (["--run-name", "two words", "--resume"], ["--run-name", "two words", "--resume", "auto"]),
    ],
)
def test_bare_resume_is_spelled_out(given, meant):
    found = bash('spell_out_resume "$@"; printf "%s\\0" "${arguments[@]}"', *given)
    assert found.stdout.split("\0")[:-1] == (meant or [""])


def test_help_needs_no_environment(checkout):
    found = start(checkout, "--help")
    assert found.returncode == 0
    assert "bash entrypoint/start.sh --preset smoke" in found.stdout
    assert not (checkout / ".venv").exists()


def children_seconds():
    """Of processor time: how long it really takes, others on this machine decide."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_ready_environment_is_used_at_once_from_any_directory(ready, tmp_path):
    seconds = []
    for _ in range(3):
        began = children_seconds()
        found = start(ready, "--preset", "smoke", "--resume", cwd=tmp_path)
        seconds.append(children_seconds() - began)
    assert min(seconds) < 1.0  # not enough to start Python and import anything
    assert (found.returncode, found.stdout, found.stderr) == (0, "<train><--preset><smoke><--resume><auto> \n", "")


def test_env_file_of_the_checkout_counts_unless_there_is_a_nearer_one(ready, tmp_path):
    (ready / ".env").write_text("")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert start(ready, cwd=elsewhere).stdout == f"<train> {ready}/.env\n"
    assert start(ready, cwd=elsewhere, WMTP_ENV_FILE="mine").stdout == "<train> mine\n"
    (elsewhere / ".env").write_text("")
    assert start(ready, cwd=elsewhere).stdout == "<train> \n"


@pytest.mark.parametrize("changed", ["requirements/runtime.txt", "requirements/torch.txt", "pyproject.toml"])
def test_changed_requirements_make_the_environment_stale(ready, changed):
    is_ready = f"source '{ready}/entrypoint/lib.sh'; locate_venv; is_ready runtime"
    assert bash(is_ready).returncode == 0
    with open(ready / changed, "a") as file:
        file.write("# changed\n")
    assert bash(is_ready).returncode == 1


def test_moved_checkout_makes_its_environment_stale(ready, tmp_path):
    moved = ready.rename(tmp_path / "moved")
    assert bash(f"source '{moved}/entrypoint/lib.sh'; locate_venv; is_ready runtime").returncode == 1


def test_venv_is_where_the_variable_says(tmp_path):
    assert bash('locate_venv; echo "$venv"').stdout == f"{ROOT}/.venv\n"
    assert bash('locate_venv; echo "$venv"', WMTP_VENV="/a b/c").stdout == "/a b/c\n"
    assert bash('locate_venv; echo "$venv"', cwd=tmp_path, WMTP_VENV="here").stdout == f"{tmp_path}/here\n"


def test_folder_that_is_no_environment_is_not_touched(checkout, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    found = start(checkout, WMTP_VENV=str(precious))
    assert found.returncode == 78
    assert f"{precious} is neither empty nor a Python environment\n  -> set WMTP_VENV" in found.stderr
    assert [path.name for path in precious.iterdir()] == ["thesis.txt"]


def test_venv_that_cannot_be_made_is_a_clear_error(checkout, tmp_path):
    (tmp_path / "file").write_text("")
    found = start(checkout, WMTP_VENV=str(tmp_path / "file/venv"))
    assert (found.returncode, found.stderr.count("\n")) == (78, 2)
    assert "cannot be written\n  -> set WMTP_VENV" in found.stderr


def test_failing_pip_says_why_and_leaves_the_environment_to_be_made_anew(checkout):
    (checkout / "requirements/runtime.txt").write_text("no-such-package-at-all==1.0 --hash=sha256:" + "0" * 64 + "\n")
    found = start(checkout, PIP_NO_INDEX="1")
    assert found.returncode == 78
    assert "no-such-package-at-all" in found.stderr
    assert "pip could not install what is needed" in found.stderr
    assert (checkout / ".venv/.wmtp-unfinished").exists()
    assert not (checkout / ".venv/.wmtp-runtime").exists()

    (checkout / ".venv/half-made").write_text("")
    again = start(checkout, PIP_NO_INDEX="1")
    assert "making it anew" in again.stderr
    assert not (checkout / ".venv/half-made").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_during_the_set_up_ends_it_with_75(checkout, tmp_path, number):
    # making the environment never ends; what does it leaves its process id
    tools = tmp_path / "tools"
    tools.mkdir()
    pid_file = tmp_path / "pid"
    hang = f'echo $$ >"{pid_file}.new"; mv "{pid_file}.new" "{pid_file}"; sleep 600'
    (tools / "python3").write_text(f'#!/bin/bash\nif [[ "$*" == *"-m venv"* ]]; then {hang}; fi\n')
    (tools / "python3").chmod(0o755)
    process = subprocess.Popen(
        ["bash", str(checkout / "entrypoint/start.sh")],
        env=ENVIRON | {"PATH": f"{tools}:{os.environ['PATH']}"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not pid_file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    _, words = process.communicate(timeout=180)
    assert process.returncode == 75
    assert "interrupted during the set-up" in words
    while runs(int(pid_file.read_text())):
        assert time.monotonic() < deadline + 60
        time.sleep(0.02)


def runs(pid):
    """A process that nobody waits for stays as a zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_second_set_up_waits_for_the_first(tmp_path):
    venv = tmp_path / "venv"
    venv.mkdir()
    order = tmp_path / "order"
    holder = subprocess.Popen(
        ["bash", "-c", f"source '{START}'; venv='{venv}'; lock_venv; echo held; read; echo first >'{order}'"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    second = subprocess.Popen(
        ["bash", "-c", f"source '{START}'; venv='{venv}'; lock_venv; echo second >>'{order}'"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert second.stderr is not None
    assert "another set-up is using" in second.stderr.readline()
    assert not order.exists()
    assert holder.communicate("go on\n", timeout=180) == ("", None)
    second.communicate(timeout=180)
    assert order.read_text() == "first\nsecond\n"


# a machine is what is on its PATH: `python3` there has this version, or none is there
@pytest.mark.parametrize(
    ("version", "venv_module", "apt", "user", "sudo", "expected"),
    [
        (None, False, False, 1000, False, "there is no python3\n  -> install Python 3.11 or newer"),
        (None, False, True, 1000, False, "there is no python3\n  -> sudo apt-get update && sudo apt-get install -y "),
        ("3.10", True, True, 1000, False, "is too old, 3.11 or newer is needed\n  -> sudo apt-get update && sudo "),
        ("3.10", True, True, 0, False, "installing python3.11 python3.11-venv"),
        (
            "3.12",
            False,
            True,
            1000,
            False,
            "venv module is missing\n  -> sudo apt-get update && sudo apt-get ",
        ),
        ("3.12", False, True, 1000, True, "installing python3.12-venv"),
        ("3.12", False, True, 0, False, "installing python3.12-venv"),
        (None, False, True, 0, False, "installing python3 python3-venv"),
    ],
)
def test_missing_python_is_installed_where_allowed_and_explained_elsewhere(
    tmp_path, version, venv_module, apt, user, sudo, expected
):
    machine = tmp_path / "bin"
    machine.mkdir()
    for tool in ("bash", "cat", "tail", "rm", "mktemp", "dirname"):
        (machine / tool).symlink_to(shutil.which(tool) or tool)
    programs = {"id": f"echo {user}"}
    if version:
        new = "exit 0" if version >= "3.11" else "exit 1"
        has_venv = "exit 0" if venv_module else "exit 1"
        programs["python3"] = (
            f'case "$*" in --version) echo Python {version}.0 ;; *ensurepip*) {has_venv} ;; '
            f"*print*) echo {version} ;; *) {new} ;; esac"
        )
    if apt:
        programs["apt-get"] = f'echo "$*" >>"{tmp_path}/apt"; exit 100'  # it is asked, but cannot
    if sudo:
        programs["sudo"] = 'shift; "$@"'
    for name, text in programs.items():
        (machine / name).write_text(f"#!{shutil.which('bash')}\n{text}\n")
        (machine / name).chmod(0o755)
    found = bash(f"PATH='{machine}'; ensure_python")
    assert found.returncode == 78
    assert expected in found.stderr
    assert (tmp_path / "apt").exists() == bool(apt and (user == 0 or sudo))


def test_the_image_needs_no_environment(checkout, tmp_path):
    (tmp_path / "wmtp").write_text('#!/bin/bash\n[[ $1 != doctor ]] || exit 0\nprintf "<%s>" "$@"\n')
    (tmp_path / "wmtp").chmod(0o755)
    environ = {"WMTP_IMAGE": "1", "PATH": f"{tmp_path}:{os.environ['PATH']}", "WMTP_WORKDIR": str(tmp_path)}
    found = start(checkout, "--resume", **environ)
    assert found.stdout == "<train><--resume><auto>"
    assert not (checkout / ".venv").exists()


def test_help_of_start_tells_every_exit_code():
    from wmtp_worker.errors import EXIT_CODES

    told = re.findall(r"\b(\d+) [a-z]", bash("usage").stdout.partition("Exit codes:")[2])
    assert sorted(map(int, told)) == sorted(EXIT_CODES)


def test_user_data_without_docker_trains(tmp_path):
    """As cloud-init runs it: no HOME, in the root directory, with no terminal; with the environment made beforehand."""
    origin, venv, clone = tmp_path / "origin", tmp_path / "venv", tmp_path / "opt/wmtp-worker"
    for part in ("configs", "entrypoint", "requirements", "wmtp_worker"):
        shutil.copytree(ROOT / part, origin / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", origin)
    git = ["git", "-C", origin, "-c", "user.name=nobody", "-c", "user.email=nobody@localhost"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "all"]):
        subprocess.run([*git, *command], check=True, timeout=60)
    (venv / "bin").mkdir(parents=True)
    (venv / "bin/python").symlink_to(sys.executable)
    (venv / "bin/wmtp").write_text(f'#!/bin/bash\nPYTHONPATH={clone} exec {sys.executable} -m wmtp_worker "$@"\n')
    (venv / "bin/wmtp").chmod(0o755)
    settings = {"PRESET": "smoke", "RUN_NAME": "first", "TRAINING__MAX_STEPS": "5", "CHECKPOINT__EVERY": "5"}
    settings |= {"TRAINING__MICRO_BATCH_SIZE": "1", "EVALUATION__MAX_BATCHES": "1", "HOST__THREADS": "1"}
    user_data = tmp_path / "part-001"
    user_data.write_text(
        "#!/bin/bash\n"
        f"git clone --quiet {origin} {clone} && cd {clone}\n"
        f"(source entrypoint/lib.sh && fingerprint runtime >{venv}/.wmtp-runtime)  # stands in for pip\n"
        + "".join(f"export WMTP_{name}={value}\n" for name, value in settings.items())
        + "bash entrypoint/start.sh --resume\n"
    )
    user_data.chmod(0o700)
    environ = {"PATH": os.environ["PATH"], "WMTP_VENV": str(venv)}
    found = subprocess.run(
        [user_data], cwd="/", env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=800
    )
    assert found.returncode == 0, found.stderr
    assert (clone / "work/checkpoints/first/final.pt").is_file()
