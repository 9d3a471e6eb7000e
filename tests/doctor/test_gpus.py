"""Checks of the GPUs: the judging by tables, the asking by an acting driver, the sum by real processes."""

import json
import subprocess
import sys

import pytest

from wmtp_worker.doctor import gpus
from wmtp_worker.host.gpu import Driver, Gpu

GIB = 1 << 30
H100 = Gpu(0, "H100", "GPU-0", 80 * GIB, 79 * GIB, (9, 0), 0)
B200 = Gpu(1, "B200", "GPU-1", 180 * GIB, 179 * GIB, (10, 0), 0)


def changed(**facts):
    return Gpu(**{**vars(H100), **facts})


@pytest.mark.parametrize(
    ("driver", "build", "status", "words"),
    [
        (Driver((12, 8), None), ("2.13", (12, 6)), "pass", "H100 × 2; the driver runs CUDA up to 12.8"),
        (Driver((13, 0), None), ("2.13", (12, 6)), "pass", "wants 12.6"),
        (Driver((12, 4), None), ("2.13", (12, 6)), "warn", "but for kernels that are compiled at run time"),
        (Driver((12, 8), None), ("2.13", (13, 0)), "fail", "wants 13.0"),
        (Driver((12, 8), "no device (100)"), ("2.13", (12, 6)), "fail", "CUDA does not start: no device (100)"),
        (Driver((12, 8), None), ("2.13+cpu", None), "warn", "built without CUDA"),
        (Driver((12, 8), None), None, "pass", "12.8"),
        (None, ("2.13", (12, 6)), "fail", "libcuda.so.1 is not there"),
    ],
)
def test_the_driver(driver, build, status, words):
    check = gpus.judge_driver([H100, H100], driver, build)
    assert (check.status, words in check.found, bool(check.advice)) == (status, True, status != "pass")
    assert gpus.judge_driver([], driver, build) is None


@pytest.mark.parametrize(
    ("architectures", "status"),
    [
        (["sm_80", "sm_90", "sm_100"], "pass"),
        (["sm_80", "sm_90"], "fail"),
        (["sm_80", "sm_90", "compute_90"], "warn"),
    ],
)
def test_the_architecture(architectures, status):
    check = gpus.judge_architecture([H100, B200], architectures)
    assert (check.status, "B200 (10.0)" in check.found) == (status, True)
    assert gpus.judge_architecture([H100], []) is None
    assert gpus.judge_architecture([changed(capability=None)], architectures) is None


@pytest.mark.parametrize(
    ("facts", "status", "words"),
    [
        ({}, "pass", "no errors"),
        ({"temperature": 63}, "pass", "no errors, 63 °C"),
        ({"uncorrected": 2}, "fail", "GPU 0: 2 uncorrected ECC errors"),
        ({"uncorrected": None, "repair_failed": True}, "fail", "no spare rows"),
        ({"repair_pending": True}, "warn", "waits for repair"),
        ({"slowed_by": ("heat",), "temperature": 91}, "warn", "slowed down by heat, 91 °C"),
    ],
)
def test_health(facts, status, words):
    check = gpus.judge_health([changed(**facts)])
    assert (check.status, words in check.found, bool(check.advice)) == (status, True, status != "pass")
    assert gpus.judge_health([]) is None


def test_one_sick_gpu_among_others():
    check = gpus.judge_health([changed(uncorrected=1), B200, changed(index=2, slowed_by=("heat",))])
    assert check.status == "fail"
    assert "GPU 0: 1 uncorrected" in check.found
    assert "GPU 2: slowed" in check.found


def test_memory_that_somebody_holds():
    assert gpus.judge_memory([H100, B200]).found == "79.0 GiB free on each"
    check = gpus.judge_memory([H100, changed(index=1, free=20 * GIB)])
    assert (check.status, check.found) == ("warn", "GPU 1: 20.0 of 80.0 GiB free")
    assert gpus.judge_memory([]) is None
    assert gpus.judge_memory([changed(memory=None, free=None)]) is None


@pytest.mark.parametrize(
    ("results", "status", "words"),
    [
        ([2.0, 2.0], "pass", "is right"),
        ([2.0, 1.0], "fail", "[2.0, 1.0]"),
        ([2.0, None], "fail", "no sum on ranks [1] of 2: out of memory"),
    ],
)
def test_a_sum_over_gpus(results, status, words):
    check = gpus.judge_collective("NCCL 2.27", 2, results, "out of memory")
    assert (check.status, words in check.found, bool(check.advice)) == (status, True, status != "pass")


def test_processes_add_up_what_they_have():
    assert gpus.collective("gloo", 2, 60) == ([2.0, 2.0], "")


def test_what_nccl_says_with_nccl_debug_is_no_result():
    noise = "host:1 [0] NCCL INFO Bootstrap: Using eth0\n"
    assert gpus._sum(f'{noise}{{"sum": 2.0}}\n{noise}') == 2.0
    assert gpus._sum(noise) is None
    assert gpus._trouble(noise, "Traceback:\nRuntimeError: no\n\n") == f"{noise.strip()}; RuntimeError: no"


def test_processes_that_cannot_add_up_say_why():
    results, trouble = gpus.collective("no-such-backend", 1, 60)
    assert results == [None]
    assert trouble


def doctor(environ, tmp_path):
    command = [sys.executable, "-m", "wmtp_worker", "doctor", "--quick", "--json", "--set", f"run.workdir={tmp_path}/w"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environ, cwd=tmp_path)
    assert done.stderr == ""
    return done.returncode, {check["name"]: check for check in json.loads(done.stdout)["checks"]}


def test_without_a_gpu_all_is_quiet(case):
    for look in (gpus.driver, gpus.architecture, gpus.health, gpus.memory, gpus.nccl):
        assert look(case()) is None


def test_a_machine_whose_gpus_are_fit(acting_driver, tmp_path):
    code, found = doctor(acting_driver(ACTING_GPUS="8"), tmp_path)
    assert code == 0
    assert "NVIDIA H100 80GB HBM3 × 8; the driver runs CUDA up to 12.8" in found["driver"]["found"]
    assert (found["gpu health"]["status"], found["gpu memory"]["status"]) == ("pass", "pass")


def test_a_machine_whose_gpus_are_sick(acting_driver, tmp_path):
    acting = {"ACTING_UNCORRECTED": "5", "ACTING_FREE": "1000000000", "ACTING_START": "803"}
    code, found = doctor(acting_driver(**acting), tmp_path)
    assert code == 78
    states = [found[name]["status"] for name in ("driver", "gpu health", "gpu memory")]
    assert states == ["fail", "fail", "warn"]


def test_a_driver_of_another_version_than_its_library(acting_driver, tmp_path):
    code, found = doctor(acting_driver(ACTING_INIT="18"), tmp_path)
    assert (code, found["driver"]["status"]) == (78, "fail")
    assert "version mismatch" in found["driver"]["found"]
    assert "gpu health" not in found
