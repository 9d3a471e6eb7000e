"""Devices and threads, with torch as it is here."""

import subprocess
import sys

import pytest
import torch

from wmtp_worker.errors import SettingsError
from wmtp_worker.host.device import describe, resolve_device, set_threads
from wmtp_worker.host.limits import cpu_limit


def test_auto_takes_the_best_there_is():
    there = [("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()), ("cpu", True)]
    assert resolve_device("auto").type == next(name for name, found in there if found)


def test_the_cpu_is_always_there():
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there():
    with pytest.raises(SettingsError, match=r"host.device='cuda', but torch .* -> set host.device=auto"):
        resolve_device("cuda")


def test_a_device_that_is_none():
    with pytest.raises(SettingsError, match="set it to one of auto, cpu, cuda, mps"):
        resolve_device("tpu")


@pytest.fixture
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
def test_threads():
    assert set_threads(1) == torch.get_num_threads() == 1
    assert set_threads(0) == torch.get_num_threads() == max(1, int(cpu_limit()))


def test_facts():
    facts = describe(torch.device("cpu"))
    assert facts["device"] == "cpu"
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()


def test_torch_is_imported_only_when_it_is_used():
    rooms = "wmtp_worker.settings, wmtp_worker.redact, wmtp_worker.host.device, wmtp_worker.doctor.checks"
    code = f"import sys, {rooms}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=180).returncode == 0
