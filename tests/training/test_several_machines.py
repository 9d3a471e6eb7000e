"""Two agents of torchrun, as on two machines, one of whose workers is killed: against one process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import TINY, TINY_RUN
from tests.servers.processes import free_ports
from tests.training.test_several_processes import OURS, SECONDS, children, train
from wmtp_worker.errors import DONE
from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.tracking.metrics import read

STEPS = ("training.max_steps=40", "evaluation.every=40", "checkpoint.every=4", "evaluation.max_batches=1")
# seconds between signs of life, and how many may be missing
QUICK = "join_timeout=120,last_call_timeout=1,keep_alive_interval=2,keep_alive_max_attempt=5"


def agent(workdir, port, host):
    """One machine's: its own group of processes, so that all of it can be lost at once."""
    options = ["train", "--run-name", TINY_RUN, "--set", f"run.workdir={workdir}"]
    options += [text for value in (*TINY, *OURS, *STEPS) for text in ("--set", value)]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    command += ["--max-restarts=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=tiny"]
    command += [f"--rdzv-conf={QUICK},is_host={int(host)}", "--local-addr=127.0.0.1", "--monitor-interval=0.1"]
    # docs/distributed.md: else the store of the first group is the second one's, too
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    command += ["-m", "wmtp_worker", *options]
    with (Path(workdir).parent / f"agent-{int(host)}.txt").open("w") as said:
        return subprocess.Popen(command, start_new_session=True, stdout=said, stderr=said, env=environ)


def wait_until(what, agents):
    end = time.monotonic() + SECONDS
    while not what():
        assert time.monotonic() < end
        assert agents[0].poll() is None
        time.sleep(0.02)


def losses(workdir):
    lines = read(RunPaths(workdir, TINY_RUN).metrics)
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


@pytest.mark.skipif("WMTP_TEST_MACHINES" not in os.environ, reason="starts torch seven times: set WMTP_TEST_MACHINES=1")
def test_a_worker_is_lost_on_one_of_two_machines(tmp_path):
    workdir, (port,) = tmp_path / "several", free_ports(1)
    paths = RunPaths(workdir, TINY_RUN)
    agents = [agent(workdir, port, host) for host in (True, False)]
    try:
        wait_until(lambda: any(line["step"] >= 5 for line in read(paths.metrics)), agents)
        (worker,) = children(agents[1].pid)
        os.kill(worker, signal.SIGKILL)
        for one in agents:
            assert one.wait(SECONDS) == DONE, (tmp_path / "agent-1.txt").read_text()
    finally:
        for one in agents:
            if one.poll() is None:
                os.killpg(one.pid, signal.SIGKILL)
            one.wait()
    log = paths.training_log.read_text()
    assert "resuming from" in log
    assert "processes was" not in log  # both again
    train(tmp_path / "one", *STEPS)
    several, one = (losses(folder) for folder in (workdir, tmp_path / "one"))
    assert list(several) == list(one) == list(range(1, 41))
    # rounding differs with the number of processes, and forty steps of AdamW make more of it
    assert several == pytest.approx(one, rel=1e-3)
