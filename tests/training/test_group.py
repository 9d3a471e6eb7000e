"""Two real ranks: what they share, agree upon, wait for, and notice of each other's end."""

import os
import signal
import time

import pytest
import torch

from tests.ranks import apart
from wmtp_worker.errors import SettingsError
from wmtp_worker.host.stop import StopRequest
from wmtp_worker.training.group import RankLost, join


def talk(rank, world, workdir):
    with join("cpu", 60) as group:
        assert (group.rank, group.world, group.first) == (rank, world, rank == 0)
        parts = group.ranks.gather([group.share(range(size)) for size in range(6)])
        for size in range(6):
            assert [number for part in parts for number in part[size]] == list(range(size))
        mine = torch.tensor([1.0, rank])
        assert group.sum(mine).tolist() == [2.0, 1.0]
        assert mine.tolist() == [1.0, rank]
        assert (group.most(float(rank)), -group.most(-float(rank))) == (1.0, 0.0)
        assert group.of_first(f"of {rank}") == "of 0"
        stop_after_the_same_step(group, told=0)
        stop_after_the_same_step(group, told=1)
        wait(group, workdir)
        lose(group)


def stop_after_the_same_step(group, told):
    stop = StopRequest()
    with stop:
        for step in range(10_000):
            time.sleep(0.001 * ((step + group.rank) % 3))
            if step == 7 and group.rank == told:
                os.kill(os.getpid(), signal.SIGTERM)
            if group.most(stop.requested):
                break
        assert group.ranks.gather((step, stop.requested)) == [(7, rank == told) for rank in range(2)]


def wait(group, workdir):
    ticks = []
    if group.first:
        end = time.monotonic() + 60
        while not (workdir / "ticked").exists() and time.monotonic() < end:
            time.sleep(0.01)
        (workdir / "fetched").touch()
        group.after_first("fetch")
    else:

        def tick():
            ticks.append(1)
            if len(ticks) == 3:
                (workdir / "ticked").touch()

        group.after_first("fetch", tick)
        assert (workdir / "fetched").exists()
        assert len(ticks) >= 3


def lose(group):
    """The last thing: one dies, and the other notices, whatever it waits in."""
    if not group.first:
        os._exit(0)
    with pytest.raises(RankLost, match="another process of this run has ended"), group.company():
        group.sum(torch.ones(3))
    with pytest.raises(RuntimeError, match="of ours"), group.company():
        raise RuntimeError("a bug of ours")
    os._exit(0)  # the group cannot be left any more


def test_what_ranks_say_to_each_other(tmp_path):
    apart(2, talk, tmp_path)


def test_alone_nothing_is_asked_of_anybody(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join("cpu", 60) as group:
        assert (group.rank, group.world, group.first) == (0, 1, True)
        assert group.share([1, 2]) == [1, 2]
        assert group.sum(torch.ones(1)) == 1
        assert group.most(-3.5) == -3.5
        assert group.of_first("x") == "x"
        group.after_first("fetch", lambda: pytest.fail("waits"))


@pytest.mark.parametrize(
    ("variables", "what"),
    [
        ({"WORLD_SIZE": "2"}, "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' is no number"),
    ],
)
def test_variables_that_make_no_group(monkeypatch, variables, what):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=what), join("cpu", 60):
        pass
