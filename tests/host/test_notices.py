"""What becomes of a notice, and on which machines anybody is asked for one."""

import logging
import socket
import subprocess
import sys
import threading
import time

import pytest

from wmtp_worker.host.notices import NoticeWatcher, service_of
from wmtp_worker.host.notices_ec2 import Ec2

PROVIDERS = ("ec2", "gcp", "azure")
FIRMWARE = {
    "ec2": {"sys/class/dmi/id/sys_vendor": "Amazon EC2\n"},
    "gcp": {"sys/class/dmi/id/sys_vendor": "Google\n", "sys/class/dmi/id/product_name": "Google Compute Engine\n"},
    "azure": {
        "sys/class/dmi/id/sys_vendor": "Microsoft Corporation\n",
        "sys/class/dmi/id/chassis_asset_tag": "7783-7084-3265-9085-8269-3286-77\n",
    },
}


def until(condition, seconds=60.0):
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "waited in vain"
        time.sleep(0.005)


def watch(server, which, stop, **options):
    return NoticeWatcher(which, stop, environ=server.environ(which), interval=0.02, **options)


def watching():
    return [thread.name for thread in threading.enumerate() if thread.name == "notices"]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_stop_is_requested(server, stop, provider, caplog):
    caplog.set_level(logging.INFO)
    began = time.monotonic()
    with watch(server, provider, stop) as watcher:
        assert watcher.source == provider
        until(lambda: len(server.asked) >= 2)
        assert not stop.requested
        server.interrupt(120)
        server.set_value("instance/preempted", "TRUE")
        server.schedule("Preempt", 30)
        until(lambda: stop.requested)
    assert stop.reason.startswith(f"a notice of {provider}: ")
    assert stop.machine_goes
    assert began + 26 < stop.deadline <= time.monotonic() + 121
    assert not stop.save_soon
    assert f"notices of {provider} are watched" in caplog.text
    assert caplog.text.count("stopping") == 1


def test_rebalance_asks_for_one_save_and_no_stop(server, stop, caplog):
    server.rebalance()
    with watch(server, "ec2", stop):
        until(lambda: stop.save_soon)
        assert stop.take_save().startswith("a notice of ec2: a higher risk of interruption")
        asked = len(server.asked)
        until(lambda: len(server.asked) > asked + 6)
        assert not stop.save_soon
        assert not stop.requested
        server.interrupt()
        until(lambda: stop.requested)
    assert caplog.text.count("saving soon") == 1


def test_a_deadline_far_away_is_a_warning_until_it_is_near(server, stop):
    server.schedule("Reboot", 900, event="far")
    with watch(server, "azure", stop):
        until(lambda: stop.save_soon)
        assert not stop.requested
        server.events.clear()
        server.schedule("Reboot", 140, event="far")
        until(lambda: stop.requested)
    assert 130 < stop.seconds_left <= 141


def test_a_deadline_that_comes_nearer_counts(server, stop, caplog):
    server.schedule("Terminate", 140)
    with watch(server, "azure", stop):
        until(lambda: stop.requested)
        assert 130 < stop.seconds_left <= 141
        server.events.clear()
        server.schedule("Terminate", 20)
        until(lambda: stop.seconds_left < 30)
        asked = len(server.asked)
        until(lambda: len(server.asked) > asked + 6)
        assert len(stop._requests) == 2  # not one more with each poll
    assert caplog.text.count("stopping") == 1


def test_only_a_service_that_never_answered_is_asked_less_often(server, stop):
    watcher = NoticeWatcher("none", stop, interval=5)
    watcher._failures = 2
    assert watcher._pause() == 20
    watcher._failures = 100_000
    assert watcher._pause() == 60
    watcher._answered = True
    assert watcher._pause() == 5


@pytest.mark.parametrize("answered", [False, True])
def test_trouble_is_told_once_and_so_is_its_end(server, stop, caplog, answered):
    caplog.set_level(logging.INFO)
    server.fault = None if answered else "500"
    with watch(server, "ec2", stop):
        if answered:
            until(lambda: "are watched" in caplog.text)
            server.fault = "500"
        until(lambda: "does not answer" in caplog.text)
        asked = len(server.asked)
        until(lambda: len(server.asked) > asked + 2)
        server.fault = None
        server.interrupt()
        until(lambda: stop.requested)
    assert caplog.text.count("does not answer") == 1
    assert caplog.text.count("are watched") == 1 + answered


def test_a_service_that_breaks_does_not_end_the_watching(server, stop, monkeypatch):
    answers = iter([KeyError("a bug")])
    poll = Ec2.poll

    def broken(self):
        for error in answers:
            raise error
        return poll(self)

    monkeypatch.setattr(Ec2, "poll", broken)
    server.interrupt()
    with watch(server, "ec2", stop):
        until(lambda: stop.requested)


@pytest.mark.parametrize("fault", ["stall", "drip"])
def test_close_cuts_off_a_call_and_joins(server, stop, fault):
    server.fault = fault
    watcher = watch(server, "azure", stop)
    until(lambda: server.asked)
    began = time.monotonic()
    watcher.close()
    watcher.close()
    assert time.monotonic() - began < 4  # it is not waited for
    assert watching() == []


def test_close_while_google_keeps_us_waiting(server, stop):
    watcher = watch(server, "gcp", stop)
    until(lambda: any("wait_for_change" in path for _, path in server.asked))
    began = time.monotonic()
    watcher.close()
    assert time.monotonic() - began < 4  # before the service would answer
    assert watching() == []


# --- which one -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", PROVIDERS)
def test_auto_finds_the_machine_by_its_firmware(machine, provider):
    assert service_of("auto", {}, machine(FIRMWARE[provider])).name == provider


def test_auto_finds_older_ec2(machine):
    assert service_of("auto", {}, machine({"sys/hypervisor/uuid": "ec2e1916-9099\n"})).name == "ec2"


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"sys/class/dmi/id/sys_vendor": "Dell Inc.\n", "sys/class/dmi/id/product_name": "PowerEdge\n"},
        {"sys/class/dmi/id/sys_vendor": "Google\n", "sys/class/dmi/id/product_name": "Eve\n"},
        {"sys/class/dmi/id/sys_vendor": "Microsoft Corporation\n", "sys/class/dmi/id/product_name": "Surface\n"},
        {"sys/class/dmi/id/sys_vendor/directory": ""},
    ],
)
def test_auto_costs_nothing_elsewhere(machine, stop, files, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(socket, "create_connection", lambda *_: pytest.fail("asked the network"))
    with NoticeWatcher("auto", stop, environ={}, root=machine(files)) as watcher:
        assert watching() == []
        assert watcher.source is None
    assert caplog.text == ""


def test_sagemaker_has_the_firmware_of_ec2_but_not_its_notices(machine):
    assert service_of("auto", {"TRAINING_JOB_NAME": "job"}, machine(FIRMWARE["ec2"])) is None


def test_none_is_nobody(machine):
    assert service_of("none", {}, machine(FIRMWARE["ec2"])) is None


@pytest.mark.parametrize("which", ["auto", "ec2"])
def test_ec2_may_be_disabled(machine, which):
    assert service_of(which, {"AWS_EC2_METADATA_DISABLED": "TRUE"}, machine(FIRMWARE["ec2"])) is None


def test_a_watcher_brings_no_third_party():
    code = (
        "import sys; before = set(sys.modules); import wmtp_worker.host.notices, wmtp_worker.host.watchdog;"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180, check=True)
    assert done.stdout == "wmtp_worker\n"
