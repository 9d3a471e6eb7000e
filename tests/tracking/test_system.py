"""Use of the machine, and of GPUs as an acting driver tells it."""

import json
import subprocess
import sys

import pytest

# one line of the file that a sampler writes
ASK = """
import sys, time
from pathlib import Path
from wmtp_worker.tracking.system import SystemSampler
path = Path(sys.argv[1])
sampler = SystemSampler(path, time.time(), 0.05, lambda: {"also": 1.0})
sampler.start()
while not path.exists() or not path.read_bytes().endswith(b"\\n"):
    time.sleep(0.05)
sampler.stop()
"""


@pytest.fixture
def ask(acting_driver, tmp_path):
    def ask(**acting):
        command = [sys.executable, "-c", ASK, str(tmp_path / "system.jsonl")]
        subprocess.run(command, check=True, timeout=180, env=acting_driver(**acting))
        line = json.loads((tmp_path / "system.jsonl").read_text().splitlines()[0])
        assert {"also", "cpu_utilization_percentage"} <= line.keys()
        return {name: value for name, value in line.items() if name.startswith("gpu_")}

    return ask


def of(number, *names):
    return [f"gpu_{number}_{name}" for name in names]


ALL = ("utilization_percentage", "memory_usage_megabytes", "memory_usage_percentage", "power_usage_watts")


def test_use_of_two_gpus(ask):
    found = ask(ACTING_GPUS="2", ACTING_FREE=str(20 << 30))
    assert list(found) == [*of(0, *ALL), *of(1, *ALL)]
    assert list(found.values())[:4] == [87, pytest.approx((60 << 30) / 1e6), 75.0, 512.5]


def test_what_one_gpu_does_not_tell_costs_nothing_else(ask):
    found = ask(ACTING_GPUS="3", ACTING_LOST="1", ACTING_SLICE="1")  # one is lost, no memory is told
    assert list(found) == [*of(0, ALL[0], ALL[3]), *of(2, ALL[0], ALL[3])]


@pytest.mark.parametrize("acting", [{"ACTING_INIT": "9"}, {"ACTING_GPUS": "0"}])
def test_without_gpus_the_rest_is_measured(ask, acting):
    assert ask(**acting) == {}
