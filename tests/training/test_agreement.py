"""Two real ranks, of which only one is told to stop."""

import os
import signal
import subprocess
import sys
import time

import pytest

from wmtp_worker.training.agreement import agree, most

RANK = """
import sys, time
from datetime import timedelta
import torch.distributed as dist
from wmtp_worker.host.stop import STOP
from wmtp_worker.training.agreement import agree, most

rank, store = int(sys.argv[1]), sys.argv[2]
STOP.install()
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60))
print("ready", flush=True)
for step in range(10_000):
    time.sleep(0.001 + 0.004 * ((step + rank) % 2))
    if agree(STOP.requested):
        break
print(step, STOP.requested, most(float(rank)), -most(-float(rank)), flush=True)
dist.destroy_process_group()
"""


@pytest.mark.parametrize("told", [0, 1])
def test_all_ranks_stop_after_the_same_step(tmp_path, told):
    environ = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environ,
        )
        for rank in range(2)
    ]
    try:
        assert [rank.stdout.readline() for rank in ranks] == ["ready\n"] * 2
        time.sleep(0.2)
        ranks[told].send_signal(signal.SIGTERM)
        said = [rank.communicate(timeout=60)[0].split() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate(timeout=10)
    (step, requested, largest, least), other = said
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert 0 < int(step) < 9_999
    assert other[0] == step
    assert [requested, other[1]] == [str(told == 0), str(told == 1)]
    assert [largest, least] == other[2:] == ["1.0", "0.0"]


def test_a_rank_of_its_own_agrees_with_itself():
    assert (agree(True), agree(False), most(-3.5)) == (True, False, -3.5)
