"""A job on another machine, by a real sshd: detached, found again, stopped; secrets stay in its environment."""

import contextlib
import json
import os
import shutil
import threading
import time
import zlib
from pathlib import Path

import pytest

from tests.launch.conftest import KEY, SECRET
from tests.servers.sshd import make_key
from wmtp_worker.launch.shell import LocalShell
from wmtp_worker.launch.ssh import Address, SshShell

# as the worker does it: a second signal ends it at once
SLOW = """hurry() { exit 143; }
save() { trap hurry TERM; while [ ! -f "$WMTP_WORKDIR/saved" ]; do sleep 0.1; done; exit 75; }
trap save"""


def job_folder(host, name):
    return host.home / ".local/state/wmtp/jobs" / name


def until(done, seconds=60):
    deadline = time.monotonic() + seconds
    while not (found := done()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def pid_of(host, name):
    file = job_folder(host, name) / "pid"
    return int(until(lambda: file.exists() and file.read_text()))


def contents(paths):
    """Of those that are still there when they are read."""
    found = []
    for path in paths:
        with contextlib.suppress(OSError):
            found.append(path.read_bytes())
    return found


@pytest.fixture
def job(host, laptop, request):
    """Launch a job by its own name, in a work directory of its own; ended whatever happens."""
    name = f"job-{zlib.crc32(request.node.name.encode())}"
    workdir = host.home / f"work-{name}"

    def launch(*arguments, code=0, **environ):
        given = ("--name", name, "--workdir", workdir, "--yes", *arguments)
        return laptop.launch("ssh", host.address, *given, code=code, **environ)

    launch.name, launch.workdir = name, workdir
    yield launch
    workdir.mkdir(exist_ok=True)
    (workdir / "end").write_text("0")
    (workdir / "saved").touch()


def state(laptop, name):
    (row,) = json.loads(laptop.launch("status", name, "--json").stdout)
    return row["state"]


def test_a_job_lives_without_the_connection_and_is_found_again(host, laptop, job):
    said = job("--preset", "smoke", "--set", "training.lr=3e-4").stdout
    assert "launched" in said
    assert state(laptop, job.name)["phase"] == "running"
    until(lambda: "line 1" in laptop.launch("logs", job.name).stdout)
    log = laptop.launch("logs", job.name).stdout
    assert "arguments: --recipe baseline --preset smoke --run-name baseline-smoke --resume auto" in log
    assert "--set training.lr=0.0003" in log
    assert f"workdir: {job.workdir}" in log
    assert "key: is here" in log
    (job.workdir / "end").write_text("74")
    found = until(lambda: (now := state(laptop, job.name))["phase"] == "ended" and now)
    assert found["exit_code"] == 74
    assert "not safe in the bucket" in laptop.launch("status", job.name).stdout


def test_secrets_are_in_no_argument_no_file_and_no_log(host, laptop, job):
    shown = job("--preset", "smoke")
    pid = pid_of(host, job.name)
    assert SECRET.encode() in Path(f"/proc/{pid}/environ").read_bytes()
    arguments = contents(Path("/proc").glob("[0-9]*/cmdline"))
    files = contents(path for root in (host.home, host.folder, laptop.home) for path in root.rglob("*"))
    assert arguments
    assert files
    said = (shown.stdout + shown.stderr + laptop.launch("logs", job.name).stdout).encode()
    for planted in (KEY.encode(), SECRET.encode()):
        assert not [text for text in [*arguments, *files, said] if planted in text]
    assert "AWS_SECRET_ACCESS_KEY=***" in shown.stdout


def test_a_stop_waits_until_the_work_is_saved(host, laptop, job):
    job("--preset", "smoke")
    until(lambda: "line 1" in laptop.launch("logs", job.name).stdout)  # before, nothing heeds the signal
    said = laptop.launch("stop", job.name).stdout
    assert "ended with 75: saved, start me again" in said
    assert "no machine was rented" in laptop.launch("stop", job.name, "--destroy", code=78).stderr
    assert laptop.launch("stop", job.name).stdout.startswith(f"{job.name}: ended with 75")
    job("--preset", "smoke")
    assert state(laptop, job.name)["phase"] == "running"


def test_a_stop_that_takes_longer_says_so(host, laptop, job):
    start = host.home / "wmtp-worker" / "entrypoint" / "start.sh"
    start.write_text(start.read_text().replace("trap 'echo saving; sleep 0.3; exit 75'", SLOW))
    job("--preset", "smoke")
    until(lambda: "line 1" in laptop.launch("logs", job.name).stdout)
    assert "has not ended in 1 s" in laptop.launch("stop", job.name, "--grace", "1", code=74).stderr
    job.workdir.mkdir(exist_ok=True)
    threading.Timer(2, (job.workdir / "saved").touch).start()
    assert "ended with 75" in laptop.launch("stop", job.name).stdout  # told once: a second signal would be another end


def test_following_a_log_loses_no_line_when_the_connection_is_lost(host, laptop, job):
    job("--preset", "smoke")
    before = host.relay.connections

    def trouble():
        until(lambda: host.relay.connections >= before + 2)
        time.sleep(0.7)
        host.relay.cut(down=True)
        time.sleep(1.5)
        host.relay.up()
        time.sleep(3)
        (job.workdir / "end").write_text("0")

    thread = threading.Thread(target=trouble)
    thread.start()
    lines = laptop.launch("logs", job.name, "--follow").stdout.splitlines()
    thread.join()
    numbers = [int(line.split()[1]) for line in lines if line.startswith("line ")]
    assert numbers == list(range(1, len(numbers) + 1))
    assert lines == (job_folder(host, job.name) / "log").read_text().splitlines()
    assert host.relay.connections >= before + 3


def test_who_reads_no_more_is_no_lost_connection(host, laptop, monkeypatch):
    monkeypatch.setenv("HOME", str(laptop.home))

    def write(data):
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        SshShell(Address.parse(host.address)).stream(["echo", "line"], write)


def test_errors_hold_no_stream_up_and_their_end_is_kept(host, laptop, monkeypatch):
    monkeypatch.setenv("HOME", str(laptop.home))
    script = "yes trouble | head -c 5000000 >&2; echo last words >&2; echo line; exit 3"
    for shell in LocalShell(), SshShell(Address.parse(host.address)):
        said = []
        done = shell.stream(["sh", "-c", script], said.append)
        assert (done.code, b"".join(said)) == (3, b"line\n")
        assert done.err.endswith("trouble\nlast words\n")


def test_a_job_that_was_killed_is_told_from_one_that_ended(host, laptop, job):
    job("--preset", "smoke")
    pid = pid_of(host, job.name)
    wrapper = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    os.kill(wrapper, 9)
    assert state(laptop, job.name)["phase"] == "running"  # the worker itself goes on
    os.kill(pid, 9)
    assert until(lambda: (now := state(laptop, job.name))["phase"] == "gone" and now)


@pytest.mark.parametrize("down", [True, False])
def test_a_job_whose_answer_was_lost_is_found_again(host, laptop, job, down, tmp_path):
    setsid, starting, go = host.home / "bin" / "setsid", tmp_path / "starting", tmp_path / "go"
    wait = f"touch {starting}; until [ -f {go} ]; do sleep 0.05; done"
    setsid.write_text(f'#!/bin/sh\n{wait}\nexec {shutil.which("setsid")} "$@"\n')
    setsid.chmod(0o755)

    def lose():
        until(starting.exists)
        host.relay.cut(down=down)

    thread = threading.Thread(target=lose)
    thread.start()
    try:
        job("--preset", "smoke", code=75)
    finally:
        thread.join()
        setsid.unlink()
        go.touch()
        host.relay.up()
    assert bool(laptop.registered) == (not down)  # it can be asked at once, or later
    pid_of(host, job.name)
    assert "runs there already" in job("--preset", "smoke", code=79).stderr
    assert "ended with 75" in laptop.launch("stop", job.name).stdout


def test_two_jobs_of_one_name_do_not_run_at_once(host, laptop, job):
    job("--preset", "smoke")
    assert "runs there already" in job("--preset", "smoke", code=79).stderr


def test_an_unknown_host_is_refused_by_its_fingerprint_until_that_is_accepted(host, laptop, job):
    host.forget()
    said = job("--preset", "smoke", code=78).stderr
    assert f"--accept-host-key {host.fingerprint}" in said
    assert "is SHA256:" in job("--preset", "smoke", "--accept-host-key", "SHA256:wrong", code=78).stderr
    assert not laptop.registered
    job("--preset", "smoke", "--accept-host-key", host.fingerprint)
    assert state(laptop, job.name)["phase"] == "running"  # it was remembered


def test_another_key_than_the_known_one_is_refused(host, laptop, job, tmp_path):
    make_key(tmp_path / "other")
    host.know(tmp_path / "other.pub")
    assert "is another one there" in job("--preset", "smoke", code=78).stderr
    host.know()


def test_what_is_wrong_is_said_in_one_line_each(host, laptop, job):
    address = host.address
    assert "no bucket is set" in job("--preset", "smoke", code=78, CLOUD_BUCKET="", CLOUD_PROVIDER="local").stderr
    nobody = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
    assert "no credentials for the bucket" in job("--preset", "smoke", code=78, **nobody).stderr
    assert "nobody is here to be asked" in laptop.launch("ssh", address, "--preset", "smoke", code=78).stderr
    assert "no address" in laptop.launch("ssh", "a:b:c d", "--yes", code=78).stderr
    assert "cannot connect" in laptop.launch("ssh", "127.0.0.1:1", "--yes", code=75).stderr
    assert "no job named nobody" in laptop.launch("logs", "nobody", code=78).stderr
    assert "--env" in job("--env", "NOT_SET_HERE", code=78).stderr


def test_a_host_without_the_worker(host, laptop, job):
    wmtp = host.home / "bin" / "wmtp"
    wmtp.rename(host.home / "wmtp")
    try:
        assert "there is no wmtp" in job("--checkout", "/nowhere", code=78).stderr
    finally:
        (host.home / "wmtp").rename(wmtp)


def test_a_host_that_takes_none_of_our_keys(host, laptop, job, tmp_path):
    (laptop.home / ".ssh").unlink()
    (laptop.home / ".ssh").mkdir()
    make_key(laptop.home / ".ssh" / "id_ed25519")
    (laptop.home / ".ssh" / "known_hosts").write_text((host.client_home / ".ssh" / "known_hosts").read_text())
    assert "takes none of our keys" in job("--preset", "smoke", code=78).stderr


def test_the_container_of_another_launch_is_left_alone(host, laptop, job):
    docker, calls = host.home / "bin" / "docker", host.home / "calls"
    # the other one's container was made while this one's image was pulled
    docker.write_text(
        f"""#!/bin/sh
echo "$1" >>{calls}
case $1 in
container) echo "Error: No such container: $3" >&2; exit 1 ;;
run) echo "docker: Error response from daemon: Conflict. The container name is already in use" >&2; exit 125 ;;
esac
"""
    )
    docker.chmod(0o755)
    try:
        assert "runs there already" in job("--preset", "smoke", "--image", "wmtp-nvidia", code=79).stderr
        assert calls.read_text().split() == ["container", "run", "container"]  # looked at, and not removed
    finally:
        docker.unlink()


def test_no_docker_there(host, laptop, job):
    docker = host.home / "bin" / "docker"
    docker.write_text("#!/bin/sh\necho docker: not found >&2\nexit 127\n")
    docker.chmod(0o755)
    try:
        assert "there is no docker" in job("--preset", "smoke", "--image", "wmtp-worker", code=78).stderr
    finally:
        docker.unlink()


def test_a_dry_run_sends_nothing(host, laptop, job):
    before = host.relay.connections
    said = job("--preset", "smoke", "--dry-run").stdout
    assert "export AWS_SECRET_ACCESS_KEY='***'" in said
    assert "setsid" in said
    assert SECRET not in said
    assert host.relay.connections == before
    assert not laptop.registered
