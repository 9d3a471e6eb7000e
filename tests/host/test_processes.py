"""Several processes of one command: their variables, exit codes, signals, and starting again."""

import signal
import subprocess
import sys
import threading
import time

import pytest

from wmtp_worker.errors import AGAIN, BUG, DONE, WRONG
from wmtp_worker.host.processes import run_processes, share_gpus
from wmtp_worker.host.stop import StopRequest


@pytest.mark.parametrize(
    ("gpus", "passes", "shards", "expected"),
    [
        (0, 1, "auto", 1),
        (1, 1, "auto", 1),
        (8, 1, "auto", 1),
        (8, 16, "auto", 8),
        (6, 16, "auto", 4),
        (7, 12, "auto", 6),
        (8, 16, 4, 8),
        (6, 16, 4, 4),
        (6, 12, 4, 4),
        (3, 12, 2, 2),
        (4, 1, 4, 4),  # cannot be: the processes say so
    ],
)
def test_as_many_gpus_as_share_a_step_evenly(gpus, passes, shards, expected):
    assert share_gpus(gpus, passes, shards) == expected


def python(code, *arguments):
    return [sys.executable, "-c", "import os, signal, sys, time\nrank = int(os.environ['RANK'])\n" + code, *arguments]


def run(code, *arguments, count=2, restarts=0, stop=None, on_restart=()):
    command = python(code, *map(str, arguments))
    return run_processes(command, count, stop or StopRequest(), restarts, on_restart)


def test_each_has_torchruns_variables(tmp_path):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    code = f"open(sys.argv[1] + os.environ['RANK'], 'w').write(' '.join(os.environ[name] for name in {names}))"
    assert run(code, f"{tmp_path}/", count=3) == DONE
    told = [(tmp_path / str(rank)).read_text() for rank in range(3)]
    assert told == [f"{rank} {rank} 3 3 127.0.0.1" for rank in range(3)]


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ((0, 0), DONE),
        ((75, 75), AGAIN),
        ((75, 78), WRONG),
        ((70, 75), BUG),
        ((78, 70), WRONG),
        ((74, 0), 74),
        ((0, 3), 3),
    ],
)
def test_the_exit_code_is_the_one_that_says_most(codes, expected):
    assert run(f"sys.exit({codes}[rank])") == expected


def test_a_dead_process_starts_all_again_with_other_arguments(tmp_path, capsys):
    code = """
open(sys.argv[1] + '/log', 'a').write(' '.join([str(rank), *sys.argv[2:]]) + '\\n')
if rank == 1 and len(sys.argv) == 2:
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert run(code, tmp_path, restarts=2, on_restart=["--resume", "auto"]) == DONE
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[2:] in (["0 --resume auto", "1 --resume auto"], ["1 --resume auto", "0 --resume auto"])
    assert "process 1 by SIGKILL; starting all 2 again, 1 times more at most" in capsys.readouterr().err


def test_it_is_not_started_again_for_ever(tmp_path, capsys):
    code = "open(sys.argv[1] + '/log', 'a').write('x')\nos.kill(os.getpid(), signal.SIGKILL)"
    assert run(code, tmp_path, count=1, restarts=2) == AGAIN
    assert (tmp_path / "log").read_text() == "xxx"
    assert "parallel.restarts is used up" in capsys.readouterr().err


def test_those_that_wait_for_one_that_failed_are_ended(monkeypatch):
    monkeypatch.setattr("wmtp_worker.host.processes._GRACE_SECONDS", 0.3)
    started = time.monotonic()
    assert run("if rank == 1: sys.exit(78)\ntime.sleep(60)") == WRONG
    assert run("if rank == 0: sys.exit(70)\ntime.sleep(60)") == BUG
    assert time.monotonic() - started < 30


def test_rank_0_may_take_its_time(monkeypatch):
    monkeypatch.setattr("wmtp_worker.host.processes._GRACE_SECONDS", 0.1)
    assert run("if rank == 0: time.sleep(1)\nsys.exit(75 if rank else 0)") == AGAIN


def test_a_signal_is_passed_on_once_and_nothing_is_started_again(tmp_path):
    code = """
def told(number, frame):
    open(sys.argv[1] + f'/signal{rank}', 'a').write(f'{number} ')
signal.signal(signal.SIGINT, told)
open(sys.argv[1] + f'/ready{rank}', 'w').close()
while not os.path.exists(sys.argv[1] + f'/signal{rank}'):
    time.sleep(0.02)
time.sleep(0.3)
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(75)
"""
    stop = StopRequest()

    def ask():
        while not all((tmp_path / f"ready{rank}").exists() for rank in range(2)):
            time.sleep(0.02)
        stop.request("SIGINT")

    asking = threading.Thread(target=ask)
    asking.start()
    assert run(code, tmp_path, stop=stop, restarts=3) == AGAIN
    asking.join()
    assert [(tmp_path / f"signal{rank}").read_text() for rank in range(2)] == [f"{signal.SIGINT:d} "] * 2


def test_they_do_not_outlive_whoever_started_them(tmp_path):
    child = f"""
from wmtp_worker.host.processes import end_with_parent
end_with_parent()
open({str(tmp_path)!r} + f'/pid{{rank}}', 'w').write(str(os.getpid()))
time.sleep(60)
"""
    code = f"""
import sys
from wmtp_worker.host.processes import run_processes, share_gpus
from wmtp_worker.host.stop import StopRequest
run_processes({python(child)!r}, 2, StopRequest(), 0)
"""
    parent = subprocess.Popen([sys.executable, "-c", code])
    files = [tmp_path / f"pid{rank}" for rank in range(2)]
    end = time.monotonic() + 60
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < end
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    pids = [int(file.read_text()) for file in files]
    while any(_is_alive(pid) for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.05)


def _is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:  # a process that nobody waits for stays as a zombie
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
