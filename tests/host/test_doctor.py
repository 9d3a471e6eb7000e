"""The checks of the doctor, each against a machine that is fit and one that is not."""

import sys

import pytest
import torch

from wmtp_worker.host import doctor
from wmtp_worker.settings import load

GIB = 1 << 30


def examine(tmp_path, *overrides):
    settings = load(preset="smoke", overrides=[f"run.workdir={tmp_path}/work", *overrides], environ={})
    return {check.name: check for check in doctor.checks(settings)}


def test_a_machine_that_runs_these_tests_is_fit(tmp_path):
    found = examine(tmp_path, "host.device=cpu")
    assert [check for check in found.values() if check.status == "fail"] == []
    assert list(found) == [
        "python",
        "torch",
        "device",
        "cpu",
        "memory",
        "work directory",
        "disk",
        "/dev/shm",
        "packaged files",
        "clock",
    ]
    assert list((tmp_path / "work").iterdir()) == []


def test_a_work_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "work").write_text("a file in the way")
    check = examine(tmp_path)["work directory"]
    assert (check.status, "File exists" in check.found, "WMTP_WORKDIR" in check.advice) == ("fail", True, True)


def test_a_device_that_is_not_there(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    check = examine(tmp_path, "host.device=cuda")["device"]
    assert (check.status, "host.device=auto" in check.advice) == ("fail", True)


def limit(name, value):
    return lambda monkeypatch: monkeypatch.setattr(doctor, name, lambda *_: value)


@pytest.mark.parametrize(
    ("change", "name", "status"),
    [
        (limit("cpu_limit", 0.5), "cpu", "warn"),
        (limit("cpu_limit", 1.0), "cpu", "pass"),
        (limit("memory_limit", GIB), "memory", "warn"),
        (limit("memory_limit", None), "memory", "warn"),
        (limit("memory_limit", 2 * GIB), "memory", "pass"),
        (limit("disk_free", 1 << 20), "disk", "fail"),
        (limit("disk_free", GIB), "disk", "warn"),
        (limit("disk_free", 5 * GIB), "disk", "pass"),
        (limit("shm_size", None), "/dev/shm", "warn"),
        (limit("shm_size", 64 << 20), "/dev/shm", "warn"),
        (limit("shm_size", GIB), "/dev/shm", "pass"),
        (lambda m: m.setattr(doctor.time, "time", lambda: 0.0), "clock", "fail"),
        (lambda m: m.setattr(doctor.time, "time", lambda: 1e12), "clock", "fail"),
        (lambda m: m.setattr(sys, "version_info", (3, 10, 0)), "python", "fail"),
        (lambda m: m.setattr("torch.__version__", "3.0.1"), "torch", "fail"),
        (lambda m: m.setitem(sys.modules, "torch", None), "torch", "fail"),
        (lambda m: m.setitem(sys.modules, "torch", None), "device", "fail"),
    ],
)
def test_every_check_can_pass_and_fail(tmp_path, monkeypatch, change, name, status):
    settings = load(preset="smoke", overrides=[f"run.workdir={tmp_path}", "host.device=cpu"], environ={})
    with monkeypatch.context() as patch:
        change(patch)
        found = {check.name: check for check in doctor.checks(settings)}
    assert found[name].status == status
    assert (found[name].advice == "") == (status == "pass")


def test_files_that_are_missing(tmp_path, monkeypatch):
    settings = load(preset="smoke", overrides=[f"run.workdir={tmp_path}"], environ={})
    monkeypatch.setattr(doctor.resources, "files", lambda package: tmp_path)
    check = {check.name: check for check in doctor.checks(settings)}["packaged files"]
    assert check.status == "fail"
    assert "tokenizer.json" in check.found
