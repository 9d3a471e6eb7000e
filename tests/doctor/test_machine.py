"""Checks of the machine, each against one that is fit and one that is not."""

import sys

import pytest
import torch

from wmtp_worker.doctor import machine
from wmtp_worker.doctor.checks import checks, probes
from wmtp_worker.settings import load

GIB = 1 << 30


def examine(tmp_path, *overrides, quick=True):
    settings = load(preset="smoke", overrides=[f"run.workdir={tmp_path}/work", *overrides], environ={})
    return {check.name: check for check in checks(settings, quick=quick)}


def test_a_machine_that_runs_these_tests_is_fit(tmp_path, one_thread):
    found = examine(tmp_path, "host.device=cpu", quick=False)
    assert [check for check in found.values() if check.status == "fail"] == []
    quick = examine(tmp_path, "host.device=cpu")
    assert [name for name in found if name in quick] == list(quick)
    assert set(found) >= {"torch", "device", "disk speed", "clock", "bucket", "model", "room for saves", "last save"}
    assert list((tmp_path / "work").iterdir()) == []


def test_a_work_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "work").write_text("a file in the way")
    check = examine(tmp_path)["work directory"]
    assert (check.status, "File exists" in check.found, "WMTP_WORKDIR" in check.advice) == ("fail", True, True)


def test_a_device_that_is_not_there():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    check = machine.device("cuda")
    assert (check.status, "host.device=auto" in check.advice) == ("fail", True)


def limit(name, value):
    return lambda monkeypatch: monkeypatch.setattr(machine, name, lambda *_: value)


@pytest.mark.parametrize(
    ("change", "look", "status"),
    [
        (limit("cpu_limit", 0.5), machine.cpu, "warn"),
        (limit("cpu_limit", 1.0), machine.cpu, "pass"),
        (limit("memory_limit", GIB), machine.memory, "warn"),
        (limit("memory_limit", None), machine.memory, "warn"),
        (limit("memory_limit", 2 * GIB), machine.memory, "pass"),
        (limit("process_limit", (64, 60)), machine.processes, "warn"),
        (limit("process_limit", (32768, 60)), machine.processes, "pass"),
        (limit("process_limit", None), machine.processes, None),
        (limit("disk_free", 1 << 20), machine.disk, "fail"),
        (limit("disk_free", GIB), machine.disk, "warn"),
        (limit("disk_free", 5 * GIB), machine.disk, "pass"),
        (limit("shm_size", None), machine.shared_memory, "warn"),
        (limit("shm_size", 64 << 20), machine.shared_memory, "warn"),
        (limit("shm_size", GIB), machine.shared_memory, "pass"),
        (lambda m: m.setattr(sys, "version_info", (3, 10, 0)), machine.python, "fail"),
        (lambda m: m.setattr("torch.__version__", "3.0.1"), lambda: machine.torch_version(imported=True), "fail"),
        (lambda m: m.setitem(sys.modules, "torch", None), lambda: machine.torch_version(imported=True), "fail"),
        (lambda m: m.setattr(machine, "torch_build", lambda: None), lambda: machine.torch_version(False), "fail"),
        (
            lambda m: m.setattr(machine, "torch_build", lambda: ("1.13", None)),
            lambda: machine.torch_version(False),
            "fail",
        ),
        (lambda m: None, lambda: machine.torch_version(imported=False), "pass"),
        (lambda m: m.setitem(sys.modules, "torch", None), lambda: machine.device("auto"), "fail"),
    ],
)
def test_every_check_can_pass_and_fail(tmp_path, monkeypatch, change, look, status):
    with monkeypatch.context() as patch:
        change(patch)
        found = look(tmp_path) if look is machine.disk else look()
    if status is None:
        assert found is None
        return
    assert found.status == status
    assert (found.advice == "") == (status == "pass")


@pytest.mark.parametrize(("quick", "status"), [(True, "warn"), (False, "fail")])
def test_a_full_disk_or_a_slow_answer_refuses_no_machine_before_the_worker_looks(case, monkeypatch, quick, status):
    monkeypatch.setattr(machine, "disk_free", lambda _: 1 << 20)
    found = {probe.name: probe for probe in probes(case(), quick=quick)}
    assert found["disk"].look().status == status
    assert {found[name].late for name in ("torch", "driver", "work directory")} == {status}


@pytest.mark.parametrize("now", [0.0, 1e12])
def test_a_clock_that_is_impossible(case, monkeypatch, now):
    monkeypatch.setattr(machine.time, "time", lambda: now)
    assert machine.clock(case()).status == "fail"


@pytest.mark.parametrize(
    ("seconds", "status", "words"),
    [
        (0.4, "pass", "as that of the bucket"),
        (-30, "pass", "30 s behind that of the bucket"),
        (61, "warn", "61 s ahead of that of the bucket"),
        (-3600, "fail", "3600 s behind that of the bucket"),
    ],
)
def test_a_clock_against_another(seconds, status, words):
    check = machine.judge_skew(seconds, "the bucket", "now", "set it")
    assert (check.status, words in check.found, bool(check.advice)) == (status, True, status != "pass")


@pytest.mark.parametrize(
    ("environ", "workdir", "status", "words"),
    [
        ({}, "/anywhere", "pass", "bare"),
        ({"RUNPOD_POD_ID": "x1"}, "/workspace/runs", "pass", "runpod x1 (RUNPOD_POD_ID is set), gives 5 s of notice"),
        ({"RUNPOD_POD_ID": "x1"}, "/root/runs", "warn", "runpod x1"),
        ({"TRAINING_JOB_NAME": "job"}, "/workspace", "warn", "120 s of notice"),
        ({"VAST_CONTAINERLABEL": "C.7"}, "/root", "pass", "vast 7 (VAST_CONTAINERLABEL is set), promises no notice"),
    ],
)
def test_the_host_and_what_it_keeps(case, environ, workdir, status, words):
    check = machine.host(case(f"run.workdir={workdir}", environ=environ))
    assert (check.status, words in check.found, bool(check.advice)) == (status, True, status != "pass")


def test_the_disk_s_speed_is_measured_and_nothing_is_left(case, tmp_path):
    one = case()
    assert machine.disk_speed(one) is None  # there is no work directory yet
    (tmp_path / "work").mkdir()
    check = machine.disk_speed(one)
    assert one.write_rate > 0
    assert f"{one.write_rate / 1e6:.0f} MB/s" in check.found
    assert list((tmp_path / "work").iterdir()) == []


def test_files_that_are_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(machine.resources, "files", lambda package: tmp_path)
    check = machine.packaged_files()
    assert check.status == "fail"
    assert "tokenizer.json" in check.found
