"""`kill -9`, then the disk is gone too: from what is in the bucket alone the run ends with the same bits."""

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from wmtp_worker.storage.layout import RunPaths

KILLS = 2
LIMIT = 120.0  # seconds for any one process


def start(workdir: Path, settings: tuple[str, ...], variables: dict[str, str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "wmtp_worker", "train", "--run-name", "tiny"]
    for setting in settings:
        command += ["--set", setting]
    environment = {**os.environ, **variables, "WMTP_WORKDIR": str(workdir)}
    with workdir.with_suffix(".txt").open("ab") as output:
        return subprocess.Popen(command, env=environment, cwd=workdir, stdout=output, stderr=output)


def said(workdir: Path) -> str:
    return workdir.with_suffix(".txt").read_text()


def kill_after(process: subprocess.Popen[bytes], workdir: Path, line: str, delay: float) -> None:
    """SIGKILL `delay` seconds after the worker has said `line`."""
    deadline = time.monotonic() + LIMIT
    while line not in said(workdir) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(delay)
    process.kill()
    process.wait(timeout=LIMIT)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("provider", ["directory", "s3", "gcs", "azure"])
def test_a_new_machine_goes_on_from_the_bucket(provider, request, tiny_settings, tiny_run, run_record, tmp_path):
    server = request.getfixturevalue(f"{provider}_server")
    variables = server.variables(server.make_bucket())
    generator = random.Random(provider)
    for number, published in zip(range(KILLS), (3, 6), strict=True):
        workdir = tmp_path / f"machine{number}"
        workdir.mkdir()
        process = start(workdir, tiny_settings, variables)
        kill_after(process, workdir, f"step_{published} is in the bucket", generator.uniform(0, 0.3))
        assert number == 0 or "fetched step_" in said(workdir), said(workdir)
        shutil.rmtree(workdir)
    last = tmp_path / "last-machine"
    last.mkdir()
    code = start(last, tiny_settings, variables).wait(timeout=LIMIT)
    assert code == 0, said(last)
    assert "fetched step_" in said(last)
    tiny_run(tmp_path / "reference")
    assert run_record(last) == run_record(tmp_path / "reference")

    # and what the bucket holds in the end is all of it
    shutil.rmtree(last)
    last.mkdir()
    assert start(last, tiny_settings, variables).wait(timeout=LIMIT) == 0
    assert "was finished already" in said(last)
    assert sorted(path.name for path in RunPaths(last, "tiny").checkpoints.glob("step_*")) == ["step_12"]
