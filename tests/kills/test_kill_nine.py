"""`kill -9` of the real command at random moments: what comes out in the end has the same bits."""

import random
import re
import time

import pytest

from tests.kills.processes import Worker
from wmtp_worker.storage.layout import RunPaths, parse_step

KILLS = 5  # before it may end
LIMIT = 120.0  # seconds for any one process


def recorded_steps(paths: RunPaths) -> int:
    """Training steps in the record now; a line that is being written does not count."""
    return paths.metrics.read_bytes().count(b'{"kind": "train"') if paths.metrics.exists() else 0


def newest_checkpoint(paths: RunPaths) -> int:
    steps = [parse_step(path.name) for path in paths.checkpoints.glob("step_*")]
    return max((step for step in steps if step is not None), default=0)


def kill_when(process: Worker, paths: RunPaths, target: int, delay: float) -> None:
    """SIGKILL once `target` steps stand in the record and `delay` seconds have passed since."""
    deadline = time.monotonic() + LIMIT
    while recorded_steps(paths) < target and process.running() and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(delay)
    process.kill()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_five_kills(tiny_settings, tiny_run, run_record, tmp_path):
    generator = random.Random(1)
    workdir, output = tmp_path / "work", tmp_path / "output.txt"
    workdir.mkdir()
    paths = RunPaths(workdir, "tiny")
    for target in (0, *sorted(generator.choices(range(1, 13), k=KILLS - 1))):
        process = Worker(workdir, tiny_settings, output, {}, fork=target > 0)
        if target == 0:
            # before the first step: while modules load, data is read, the model built
            time.sleep(generator.uniform(0, 8))
        kill_when(process, paths, target, generator.uniform(0, 0.1))
        # what it said it had saved is there
        said = [int(step) for step in re.findall(r"saved step_(\d+):", output.read_text())]
        assert newest_checkpoint(paths) >= max(said, default=0), f"killed after step {recorded_steps(paths)}"
    assert Worker(workdir, tiny_settings, output, {}, fork=False).wait(LIMIT) == 0, output.read_text()
    # one thread, as there: bits depend on the thread count
    tiny_run(tmp_path / "reference")
    assert run_record(workdir) == run_record(tmp_path / "reference")
