"""`kill -9`, then the disk is gone too: from what is in the bucket alone the run ends with the same bits."""

import random
import shutil
import time
from pathlib import Path

import pytest

from tests.kills.processes import Worker
from wmtp_worker.storage.layout import RunPaths

KILLS = 2
LIMIT = 120.0  # seconds for any one process
LEASE = ("checkpoint.lease_seconds=3",)  # what a new machine waits for


def said(workdir: Path) -> str:
    return workdir.with_suffix(".txt").read_text()


def kill_after(process: Worker, workdir: Path, line: str, delay: float) -> None:
    """SIGKILL `delay` seconds after the worker has said `line`."""
    deadline = time.monotonic() + LIMIT
    while line not in said(workdir) and process.running() and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(delay)
    process.kill()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("provider", ["directory", "s3", "gcs", "azure"])
def test_a_new_machine_goes_on_from_the_bucket(provider, request, tiny_settings, tiny_run, run_record, tmp_path):
    server = request.getfixturevalue(f"{provider}_server")
    variables = server.variables(server.make_bucket())
    generator = random.Random(provider)

    def start(workdir: Path, *, fork: bool) -> Worker:
        return Worker(workdir, (*tiny_settings, *LEASE), workdir.with_suffix(".txt"), variables, fork=fork)

    for number, published in zip(range(KILLS), (3, 6), strict=True):
        workdir = tmp_path / f"machine{number}"
        workdir.mkdir()
        process = start(workdir, fork=True)
        kill_after(process, workdir, f"step_{published} is in the bucket", generator.uniform(0, 0.3))
        assert number == 0 or "fetched step_" in said(workdir), said(workdir)
        shutil.rmtree(workdir)
    last = tmp_path / "last-machine"
    last.mkdir()
    # one of them the real command, started anew
    assert start(last, fork=provider != "directory").wait(LIMIT) == 0, said(last)
    assert "fetched step_" in said(last)
    tiny_run(tmp_path / "reference")
    assert run_record(last) == run_record(tmp_path / "reference")

    # and what the bucket holds in the end is all of it
    shutil.rmtree(last)
    last.mkdir()
    assert start(last, fork=True).wait(LIMIT) == 0, said(last)
    assert "was finished already" in said(last)
    assert sorted(path.name for path in RunPaths(last, "tiny").checkpoints.glob("step_*")) == ["step_12"]
