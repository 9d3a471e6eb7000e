"""What the metadata services of EC2, Google and Azure say, and what is made of it; served on loopback."""

import socket
import threading
import time

import pytest

from wmtp_worker.host.metadata import Endpoint, Unavailable
from wmtp_worker.host.notices_azure import Azure
from wmtp_worker.host.notices_ec2 import Ec2
from wmtp_worker.host.notices_gcp import Gcp

PROVIDERS = {"ec2": Ec2, "gcp": Gcp, "azure": Azure}


def until(condition, seconds=60.0):
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "waited in vain"
        time.sleep(0.005)


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
    assert 105 < left(notice) <= 121
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
    assert 105 < left(notice) <= 121
    [notice] = Azure(server.environ("azure")).poll()
    assert 15 < left(notice) <= 31


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
    thread.join(60)
    [([notice], told)] = seen
    assert told - changed < 4  # before the service would answer anyhow
    assert (notice.kind, notice.source) == ("preempt", "gcp")
    assert 15 < left(notice) <= 30


def test_gcp_a_change_between_two_polls_is_not_missed(server):
    service = Gcp(server.environ("gcp"))
    service.poll()
    server.set_value("instance/preempted", "TRUE")
    began = time.monotonic()
    assert len(service.poll()) == 1
    assert time.monotonic() - began < 4


def test_gcp_preempted_before_we_began(server):
    server.set_value("instance/preempted", "TRUE")
    assert [notice.kind for notice in Gcp(server.environ("gcp")).poll()] == ["preempt"]


def test_gcp_maintenance_without_gpu_is_a_minute_ahead(server, tmp_path):
    service = Gcp(server.environ("gcp"), tmp_path)
    server.set_value("instance/maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")
    [notice] = service.poll()
    assert (notice.kind, notice.certain) == ("maintenance", True)
    assert 40 < left(notice) <= 60


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
    assert 15 < left(notice) <= 31
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
    monkeypatch.setattr("wmtp_worker.host.notices_azure.ANSWER_SECONDS", 2.0)
    server.first_delay = 4.0
    server.schedule()
    service = Azure(server.environ("azure"))
    assert len(service.poll()) == 1
    server.first_delay = 8.0
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
    for module in ("metadata", "notices_ec2", "notices_gcp", "notices_azure"):
        monkeypatch.setattr(f"wmtp_worker.host.{module}.ANSWER_SECONDS", 0.2)
    monkeypatch.setattr("wmtp_worker.host.notices_azure._FIRST_SECONDS", 0.2)
    monkeypatch.setattr(Endpoint.ask, "__kwdefaults__", {"method": "GET", "seconds": 0.2})
    server.fault = fault
    began = time.monotonic()
    with pytest.raises(Unavailable):
        PROVIDERS[provider](server.environ(provider)).poll()
    assert time.monotonic() - began < 10  # the server would stall for 30 s


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
