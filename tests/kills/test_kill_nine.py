"""`kill -9` of the real command at random moments: what comes out in the end has the same bits."""

import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from wmtp_worker.storage.layout import RunPaths, parse_step

CHAINS, KILLS = 4, 5  # chains run two at a time; each is killed so often before it may end
SAVE_EVERY = 3
LIMIT = 120.0  # seconds for any one process


def start(workdir: Path, settings: tuple[str, ...]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "wmtp_worker", "train", "--run-name", "tiny"]
    for setting in settings:
        command += ["--set", setting]
    environment = {**os.environ, "WMTP_WORKDIR": str(workdir)}
    output = (workdir / "output.txt").open("ab")
    with output:
        return subprocess.Popen(command, env=environment, cwd=workdir, stdout=output, stderr=output)


def recorded_steps(paths: RunPaths) -> int:
    """Training steps in the record now; a line that is being written does not count."""
    return paths.metrics.read_bytes().count(b'{"kind": "train"') if paths.metrics.exists() else 0


def newest_checkpoint(paths: RunPaths) -> int:
    steps = [parse_step(path.name) for path in paths.checkpoints.glob("step_*")]
    return max((step for step in steps if step is not None), default=0)


def kill_when(process: subprocess.Popen[bytes], paths: RunPaths, target: int, delay: float) -> None:
    """SIGKILL once `target` steps stand in the record and `delay` seconds have passed since."""
    deadline = time.monotonic() + LIMIT
    while recorded_steps(paths) < target and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(delay)
    process.kill()
    process.wait(timeout=LIMIT)


def chain(number: int, workdir: Path, settings: tuple[str, ...]) -> list[str]:
    """Kill a run KILLS times, then let it end. Returns what went wrong."""
    generator = random.Random(number)
    paths = RunPaths(workdir, "tiny")
    problems = []
    for target in sorted(generator.choices(range(13), k=KILLS)):
        process = start(workdir, settings)
        if target == 0:
            # before the first step: while modules load, data is read, the model built
            time.sleep(generator.uniform(0, 8))
        kill_when(process, paths, target, generator.uniform(0, 0.1))
        # the process may have been between the record of a step and its save, never further behind
        safe = SAVE_EVERY * ((recorded_steps(paths) - 1) // SAVE_EVERY)
        if newest_checkpoint(paths) < safe:
            problems.append(f"killed after step {recorded_steps(paths)}, newest checkpoint {newest_checkpoint(paths)}")
    if (code := start(workdir, settings).wait(timeout=LIMIT)) != 0:
        problems.append(f"the last process ended with {code}: {(workdir / 'output.txt').read_text()[-2000:]}")
    return problems


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_kills(tiny_settings, tiny_run, run_record, tmp_path):
    # one thread each, as in the reference: bits depend on the thread count
    workdirs = [tmp_path / f"chain{number}" for number in range(CHAINS)]
    for workdir in workdirs:
        workdir.mkdir()
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda item: chain(*item, tiny_settings), enumerate(workdirs)))
    assert results == [[]] * CHAINS
    tiny_run(tmp_path / "reference")
    expected = run_record(tmp_path / "reference")
    for workdir in workdirs:
        assert run_record(workdir) == expected
