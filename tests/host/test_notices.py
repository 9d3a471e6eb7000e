"""Real metadata services on loopback: what each of them says, and what becomes of it."""

import logging
import socket
import subprocess
import sys
import threading
import time

import pytest

from tests.servers.metadata import serve
from wmtp_worker.host.metadata import Endpoint, Unavailable
from wmtp_worker.host.notices import NoticeWatcher, service_of
from wmtp_worker.host.notices_azure import Azure
from wmtp_worker.host.notices_ec2 import Ec2
from wmtp_worker.host.notices_gcp import Gcp
from wmtp_worker.host.stop import StopRequest

PROVIDERS = {"ec2": Ec2, "gcp": Gcp, "azure": Azure}
FIRMWARE = {
    "ec2": {"sys/class/dmi/id/sys_vendor": "Amazon EC2\n"},
    "gcp": {"sys/class/dmi/id/sys_vendor": "Google\n", "sys/class/dmi/id/product_name": "Google Compute Engine\n"},
    "azure": {
        "sys/class/dmi/id/sys_vendor": "Microsoft Corporation\n",
        "sys/class/dmi/id/chassis_asset_tag": "7783-7084-3265-9085-8269-3286-77\n",
    },
}


@pytest.fixture
def server():
    with serve() as running:
        yield running


@pytest.fixture
def stop():
    return StopRequest()


@pytest.fixture
def machine(tmp_path):
    def build(files):
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content)
        return tmp_path

    return build


def until(condition, seconds=10.0):
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "waited in vain"
        time.sleep(0.005)


def watch(server, which, stop, **options):
    return NoticeWatcher(which, stop, environ=server.environ(which), interval=0.02, **options)


def watching():
    return [thread.name for thread in threading.enumerate() if thread.name == "notices"]


def left(notice):
    return notice.deadline - time.monotonic()


# --- EC2 -----------------------------------------------------------------------------------------------------------


def test_ec2_no_notice_is_two_404(server):
    service = Ec2(server.environ("ec2"))
    assert service.poll() == []
    assert service.poll() == []
    assert server.asked == [
        ("PUT", "/latest/api/token"),
        ("GET", "/latest/meta-data/spot/instance-action"),
        ("GET", "/latest/meta-data/events/recommendations/rebalance"),
        ("GET", "/latest/meta-data/spot/instance-action"),
        ("GET", "/latest/meta-data/events/recommendations/rebalance"),
    ]


@pytest.mark.parametrize("action", ["terminate", "stop"])
def test_ec2_two_minutes_ahead(server, action):
    server.interrupt(120, action)
    [notice] = Ec2(server.environ("ec2")).poll()
    assert (notice.kind, notice.source, notice.certain) == (action, "ec2", True)
    assert 117 < left(notice) <= 121
    assert notice.detail.startswith(f"spot interruption, {action} at ")


def test_ec2_hibernation_has_no_time_to_count(server):
    server.interrupt(120, "hibernate")
    [notice] = Ec2(server.environ("ec2")).poll()
    assert (notice.kind, notice.deadline) == ("hibernate", None)


@pytest.mark.parametrize("skew", [-7200, 7200])
def test_a_local_clock_that_is_wrong_does_not_matter(server, skew):
    server.skew = skew
    server.interrupt(120)
    server.schedule("Preempt", 30)
    [notice] = Ec2(server.environ("ec2")).poll()
    assert 117 < left(notice) <= 121
    [notice] = Azure(server.environ("azure")).poll()
    assert 27 < left(notice) <= 31


def test_ec2_a_token_that_ran_out_is_renewed(server):
    service = Ec2(server.environ("ec2"))
    service.poll()
    server.tokens.clear()
    server.interrupt()
    assert len(service.poll()) == 1
    assert [method for method, _ in server.asked].count("PUT") == 2


def test_ec2_that_takes_no_token_is_asked_twice_and_not_for_ever(server, monkeypatch):
    monkeypatch.setattr(server, "new_token", lambda: "of no use")
    service = Ec2(server.environ("ec2"))
    with pytest.raises(Unavailable, match="401"):
        service.poll()
    assert len(server.asked) == 2


def test_ec2_rebalance_is_only_a_warning(server):
    server.rebalance()
    [notice] = Ec2(server.environ("ec2")).poll()
    assert (notice.kind, notice.deadline, notice.certain) == ("rebalance", None, False)
    server.interrupt()
    [notice] = Ec2(server.environ("ec2")).poll()
    assert notice.kind == "terminate"


@pytest.mark.parametrize("said", ["", "[]", "{}", '{"action": 3}', '{"action": "a b\\u001b"}', "[" * 50_000])
def test_ec2_garbage_is_no_notice(server, said):
    server.items["spot/instance-action"] = said
    with pytest.raises(Unavailable):
        Ec2(server.environ("ec2")).poll()


@pytest.mark.parametrize("moment", ['"soon"', "7", "null", '""'])
def test_ec2_a_notice_stands_whatever_its_time(server, moment):
    server.items["spot/instance-action"] = f'{{"action": "terminate", "time": {moment}}}'
    [notice] = Ec2(server.environ("ec2")).poll()
    assert (notice.kind, notice.deadline) == ("terminate", None)


def test_ec2_by_ipv6():
    service = Ec2({"AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE": "IPv6"})
    assert service._endpoint._url == "http://[fd00:ec2::254]"
    assert service._endpoint._connection().host == "fd00:ec2::254"


# --- Google --------------------------------------------------------------------------------------------------------


def test_gcp_preemption_is_told_while_it_waits(server):
    service = Gcp(server.environ("gcp"))
    assert service.poll() == []
    seen = []
    thread = threading.Thread(target=lambda: seen.append((service.poll(), time.monotonic())))
    thread.start()
    until(lambda: any("wait_for_change=true" in path for _, path in server.asked))
    changed = time.monotonic()
    server.set_value("instance/preempted", "TRUE")
    thread.join(10)
    [([notice], told)] = seen
    assert told - changed < 1
    assert (notice.kind, notice.source) == ("preempt", "gcp")
    assert 28 < left(notice) <= 30


def test_gcp_a_change_between_two_polls_is_not_missed(server):
    service = Gcp(server.environ("gcp"))
    service.poll()
    server.set_value("instance/preempted", "TRUE")
    began = time.monotonic()
    assert len(service.poll()) == 1
    assert time.monotonic() - began < 1


def test_gcp_preempted_before_we_began(server):
    server.set_value("instance/preempted", "TRUE")
    assert [notice.kind for notice in Gcp(server.environ("gcp")).poll()] == ["preempt"]


def test_gcp_maintenance_without_gpu_is_a_minute_ahead(server, tmp_path):
    service = Gcp(server.environ("gcp"), tmp_path)
    server.set_value("instance/maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")
    [notice] = service.poll()
    assert (notice.kind, notice.certain) == ("maintenance", True)
    assert 58 < left(notice) <= 60


def test_gcp_maintenance_with_gpu_is_an_hour_ahead_if_we_saw_it_begin(server, machine, monkeypatch):
    monkeypatch.setattr("wmtp_worker.host.notices_gcp._WAIT_SECONDS", 0)
    root = machine({"dev/nvidiactl": ""})
    service, late = (Gcp(server.environ("gcp"), root) for _ in range(2))
    service.poll()
    server.set_value("instance/maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")
    [notice] = service.poll()
    assert notice.certain
    assert 3590 < left(notice) <= 3600
    assert service.poll() == [notice]  # not an hour from each poll
    assert [(one.certain, one.deadline) for one in late.poll()] == [(False, None)]


def test_gcp_migration_is_no_notice(server):
    server.set_value("instance/maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE")
    assert Gcp(server.environ("gcp")).poll() == []


def test_gcp_items_that_are_not_there(server):
    server.values.clear()
    assert Gcp(server.environ("gcp")).poll() == []


def test_what_is_not_googles_is_not_believed(server):
    server.flavor = "Other"
    server.values["instance/preempted"] = "TRUE"
    with pytest.raises(Unavailable, match="not answered by a Google"):
        Gcp(server.environ("gcp")).poll()


# --- Azure ---------------------------------------------------------------------------------------------------------


def test_azure_preemption(server):
    service = Azure(server.environ("azure"))
    assert service.poll() == []
    server.schedule("Preempt", 30)
    [notice] = service.poll()
    assert (notice.kind, notice.source, notice.certain) == ("preempt", "azure", True)
    assert 27 < left(notice) <= 31
    assert {method for method, _ in server.asked} == {"GET"}  # never acknowledged


@pytest.mark.parametrize(
    ("kind", "seen"), [("Reboot", 1), ("Redeploy", 1), ("Terminate", 1), ("Freeze", 0), ("New", 0)]
)
def test_azure_kinds(server, kind, seen):
    server.schedule(kind, 900)
    assert len(Azure(server.environ("azure")).poll()) == seen


def test_azure_events_of_other_machines(server):
    server.schedule("Preempt", resources=("worker_1", "worker_2"))
    assert Azure(server.environ("azure")).poll() == []
    server.schedule("Preempt", resources=("worker_1", "Worker_3"))
    assert len(Azure(server.environ("azure")).poll()) == 1
    server.schedule("Preempt", resources=())
    assert len(Azure(server.environ("azure")).poll()) == 2


@pytest.mark.parametrize("moment", ["", None, "soon"])
def test_azure_an_event_that_has_started(server, moment):
    server.schedule("Preempt", EventStatus="Started", NotBefore=moment)
    [notice] = Azure(server.environ("azure")).poll()
    assert notice.deadline is None


def test_azure_first_call_may_take_long(server, monkeypatch):
    monkeypatch.setattr("wmtp_worker.host.notices_azure.ANSWER_SECONDS", 0.1)
    server.first_delay = 0.5
    server.schedule()
    service = Azure(server.environ("azure"))
    assert len(service.poll()) == 1
    server.first_delay = 0.5
    with pytest.raises(Unavailable):
        service.poll()


@pytest.mark.parametrize("events", [None, {}, [3]])
def test_azure_garbage(server, events):
    server.events = events
    with pytest.raises(Unavailable):
        Azure(server.environ("azure")).poll()


# --- all of them ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("fault", ["500", "garbage", "stall", "drip", "reset"])
def test_faults_are_bounded(server, provider, fault, monkeypatch):
    for module in ("metadata", "notices_gcp", "notices_azure"):
        monkeypatch.setattr(f"wmtp_worker.host.{module}.ANSWER_SECONDS", 0.2)
    monkeypatch.setattr("wmtp_worker.host.notices_azure._FIRST_SECONDS", 0.2)
    monkeypatch.setattr(Endpoint.ask, "__kwdefaults__", {"method": "GET", "seconds": 0.2})
    server.fault = fault
    began = time.monotonic()
    with pytest.raises(Unavailable):
        PROVIDERS[provider](server.environ(provider)).poll()
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("provider", PROVIDERS)
def test_nobody_is_there(provider, server, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        monkeypatch.setattr(server, "server_port", taken.getsockname()[1])
        with pytest.raises(Unavailable, match="refused"):
            PROVIDERS[provider](server.environ(provider)).poll()


@pytest.mark.parametrize("address", ["https://127.0.0.1", "ftp://x", "http://", "http://[", "http://127.0.0.1:x"])
def test_no_address(address):
    with pytest.raises(Unavailable, match="no address"):
        Endpoint(address).ask("/", {})


@pytest.mark.parametrize("provider", PROVIDERS)
def test_proxies_are_not_used(server, provider, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert PROVIDERS[provider](server.environ(provider)).poll() == []


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_stop_is_requested(server, stop, provider, caplog):
    caplog.set_level(logging.INFO)
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
    assert 26 < stop.seconds_left <= 121
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
    assert time.monotonic() - began < 1
    assert watching() == []


def test_close_while_google_keeps_us_waiting(server, stop):
    watcher = watch(server, "gcp", stop)
    until(lambda: any("wait_for_change" in path for _, path in server.asked))
    began = time.monotonic()
    watcher.close()
    assert time.monotonic() - began < 1
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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "wmtp_worker\n"
