"""Facts about GPUs: asked of an acting driver, and judged without one."""

import json
import subprocess
import sys

import pytest

from wmtp_worker.host.gpu import Gpu, NoDriver, driver, gpus, parse_version, runs_on, torch_build, visible

ASK = """
import json
from wmtp_worker.host.gpu import NoDriver, driver, gpus
try:
    found = [vars(one) for one in gpus()]
except NoDriver as error:
    found = [str(error), error.broken]
print(json.dumps([found, vars(driver()) if driver() else None]))
"""


@pytest.fixture
def ask(acting_driver):
    def run(**acting):
        done = subprocess.run(
            [sys.executable, "-c", ASK], capture_output=True, text=True, timeout=180, env=acting_driver(**acting)
        )
        assert done.stderr == ""
        return json.loads(done.stdout)

    return run


def test_a_healthy_gpu(ask):
    found, told = ask(ACTING_GPUS="2")
    assert [one["uuid"] for one in found] == ["GPU-00000001-0000", "GPU-00000002-0000"]
    assert found[0] == {
        "index": 0,
        "name": "NVIDIA H100 80GB HBM3",
        "uuid": "GPU-00000001-0000",
        "memory": 80 << 30,
        "free": 79 << 30,
        "capability": [9, 0],
        "uncorrected": 0,
        "repair_pending": False,
        "repair_failed": False,
        "slowed_by": [],
        "temperature": 41,
    }
    assert told == {"version": [12, 8], "trouble": None}


def test_a_gpu_in_trouble(ask):
    found, told = ask(
        ACTING_UNCORRECTED="3", ACTING_PENDING="1", ACTING_FAILED="1", ACTING_REASONS="0x4c", ACTING_START="802"
    )
    one = found[0]
    assert (one["uncorrected"], one["repair_pending"], one["repair_failed"]) == (3, True, True)
    assert one["slowed_by"] == ["heat (by hardware)"]
    assert "fabric manager" in told["trouble"]


def test_a_slice_of_a_gpu_may_not_ask_for_memory(ask):
    one = ask(ACTING_SLICE="1")[0][0]
    assert (one["memory"], one["free"], one["capability"]) == (None, None, [9, 0])


def test_a_gpu_that_knows_no_ecc(ask):
    one = ask(ACTING_NO_ECC="1", ACTING_REASONS="8")[0][0]
    assert (one["uncorrected"], one["repair_pending"], one["repair_failed"]) == (None, False, False)
    assert one["slowed_by"] == ["its hardware"]


@pytest.mark.parametrize(("code", "broken"), [("18", True), ("9", False), ("999", True)])
def test_a_driver_that_does_not_start(ask, code, broken):
    assert ask(ACTING_INIT=code)[0][1] is broken


def test_without_a_driver_nothing_is_said():
    if driver() is not None:
        pytest.skip("there is a driver")
    with pytest.raises(NoDriver) as error:
        gpus()
    assert not error.value.broken


@pytest.mark.parametrize(
    ("capability", "architectures", "way"),
    [
        ((9, 0), ["sm_80", "sm_90"], "native"),
        ((8, 6), ["sm_80"], "native"),
        ((8, 0), ["sm_86"], "no"),
        ((12, 0), ["sm_90", "sm_90a"], "no"),
        ((12, 0), ["sm_90", "compute_90"], "jit"),
        ((12, 0), ["sm_100", "sm_120"], "native"),
        ((10, 0), ["sm_120", "compute_120"], "no"),
        ((9, 0), ["sm_90a"], "native"),
        ((9, 5), ["sm_90a"], "no"),
        ((7, 0), [], "no"),
        ((7, 0), ["", "sm_", "nonsense", "gfx90a"], "no"),
    ],
)
def test_which_builds_run_on_a_gpu(capability, architectures, way):
    assert runs_on(capability, architectures) == way


@pytest.mark.parametrize(
    ("chosen", "left"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("1", [1]),
        ("2,0", [2, 0]),
        ("GPU-b", [1]),
        ("0,9,1", [0]),
        ("-1", []),
    ],
)
def test_visible_devices(chosen, left):
    found = [Gpu(index, "a GPU", f"GPU-{letter}", 1, 1) for index, letter in enumerate("abc")]
    environ = {} if chosen is None else {"CUDA_VISIBLE_DEVICES": chosen}
    assert [one.index for one in visible(found, environ)] == left


def test_the_build_of_torch_is_read_without_importing_it():
    code = "import sys; from wmtp_worker.host.gpu import torch_build; print(torch_build(), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180, check=True)
    import torch

    cuda = None if torch.version.cuda is None else parse_version(torch.version.cuda)
    assert torch_build() == (torch.__version__, cuda)
    assert done.stdout == f"{(str(torch.__version__), cuda)} False\n"


def test_versions():
    assert parse_version("12.6") == (12, 6)
    assert parse_version("13") == (13, 0)
    with pytest.raises(ValueError, match="invalid literal"):
        parse_version("new")
