"""The table of GPUs: every figure there, none absurd."""

import pytest
from pydantic import ValidationError

from wmtp_worker.errors import SettingsError
from wmtp_worker.planning.device import GIB, Gpu, find, table

KEYS = sorted(table())


def test_the_usual_ones_are_there():
    wanted = {"a100-40gb", "a100-80gb", "h100-sxm", "h100-pcie", "h200", "b200", "l4", "l40s", "a10g", "t4"}
    assert wanted | {"v100-16gb", "v100-32gb", "rtx-3090", "rtx-4090", "rtx-5090", "rtx-a6000"} <= set(KEYS)


@pytest.mark.parametrize("key", KEYS)
def test_figures_are_of_the_size_that_such_figures_have(key):
    gpu = table()[key]
    assert 8 <= gpu.memory <= 300
    assert 5 <= gpu.fp32 <= 150
    assert gpu.bf16 is None or 1 < gpu.bf16 / gpu.fp32 < 40  # dense: sparse figures would be twice that
    assert 200 <= gpu.bandwidth <= 10_000
    assert 16 <= gpu.link <= 2_000
    assert len(gpu.source) > 10


def test_a_line_without_a_source_is_refused():
    line = table()["h100-sxm"].model_dump()
    for wrong in ({"source": ""}, {"bandwidth": 0}, {"memory": -1}, {"url": "example.org"}, {"price": 2.0}):
        with pytest.raises(ValidationError):
            Gpu.model_validate(line | wrong)


def test_units():
    device = find("h100-sxm", "bf16", "defaults")
    assert device.memory == 80 * GIB
    assert device.flops == pytest.approx(989.4e12)
    assert device.bandwidth == pytest.approx(3.35e12)
    assert device.link == pytest.approx(450e9)  # one of both directions
    assert find("h100-sxm", "fp32", "defaults").flops == pytest.approx(66.9e12)


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(SettingsError, match="did you mean h100-sxm"):
        find("h100-smx", "bf16", "defaults")


def test_bf16_where_the_hardware_has_none():
    with pytest.raises(SettingsError, match=r"NVIDIA T4 has no bf16.*set training.precision=fp32"):
        find("t4", "bf16", "--set training.precision=bf16")
