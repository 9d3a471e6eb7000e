"""Checks of what is elsewhere, against servers on loopback that are fit, and that are not."""

import socket

import pytest

from tests.servers.metadata import serve
from tests.servers.s3 import READER_KEY, READER_SECRET
from wmtp_worker.doctor import machine, remote


@pytest.fixture
def bucket(use_environ, case):
    """`bucket(server, "name", AWS_…=…)`: what the doctor says of a bucket, one that is there unless it is named."""

    def look(server, name=None, **environ):
        environ = {**server.environ, **environ}
        use_environ(environ)
        one = case(variables={**server.variables(name or server.make_bucket()), **environ})
        return remote.bucket(one), one

    return look


@pytest.mark.parametrize("kind", ["directory", "s3", "gcs", "azure"])
def test_a_bucket_that_is_fit(request, bucket, kind):
    check, one = bucket(request.getfixturevalue(f"{kind}_server"))
    assert check.status == "pass", check
    assert "conditional put" in check.found
    assert one.upload_rate > 0
    from wmtp_worker.storage.open import open_store

    store = open_store(one.settings.cloud)
    assert list(store.list()) == []
    store.close()


def test_a_bucket_that_is_not_there(s3_server, bucket):
    check, _ = bucket(s3_server, "no-such-bucket")
    assert (check.status, "no-such-bucket" in check.found) == ("fail", True)
    assert check.advice


def test_a_wrong_key(s3_server, bucket):
    check, _ = bucket(s3_server, AWS_SECRET_ACCESS_KEY="a-wrong-secret-key")
    assert check.status == "fail"
    assert check.advice
    assert "a-wrong-secret-key" not in check.found + check.advice


def test_a_wrong_key_may_be_a_wrong_clock(s3_server, use_environ, case):
    use_environ({**s3_server.environ, "AWS_SECRET_ACCESS_KEY": "a-wrong-secret-key"})
    one = case(variables={**s3_server.variables(s3_server.make_bucket()), **s3_server.environ})
    one.skew = 3600.0, "the bucket"
    assert "set the clock first, it is 3600 s off" in remote.bucket(one).advice


def test_credentials_that_may_only_read(s3_server, bucket):
    reader = {"AWS_ACCESS_KEY_ID": READER_KEY, "AWS_SECRET_ACCESS_KEY": READER_SECRET}
    check, _ = bucket(s3_server, **reader)
    assert (check.status, check.found.startswith("may be read, but")) == ("fail", True)
    assert "the right to write objects" in check.advice


def test_a_server_that_is_away(s3_server, bucket, unused_address, monkeypatch):
    monkeypatch.setattr(remote, "_PATIENCE", 0.2)
    check, _ = bucket(s3_server, "bucket", WMTP_CLOUD__ENDPOINT_URL=unused_address)
    assert (check.status, bool(check.advice)) == ("fail", True)


@pytest.fixture
def unused_address():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{found.getsockname()[1]}"


def test_no_bucket_is_fine_at_home_only(case):
    assert remote.bucket(case()).status == "pass"
    assert remote.bucket(case(environ={"VAST_CONTAINERLABEL": "C.1"})).status == "warn"


# --- the metadata service, and clocks ----------------------------------------------------------------------------


@pytest.fixture
def service():
    with serve() as running:
        yield running


@pytest.mark.parametrize("provider", ["ec2", "gcp", "azure"])
@pytest.mark.parametrize("skew", [0.0, 3600.0])
def test_a_metadata_service_that_answers(service, case, provider, skew):
    service.skew = skew
    one = case(f"host.notices={provider}", environ=service.environ(provider))
    assert remote.metadata(one).status == "pass"
    assert one.skew[0] == pytest.approx(-skew, abs=3)
    assert machine.clock(one).status == ("fail" if skew else "pass")


def test_a_metadata_service_that_is_two_hops_away(service, case):
    service.fault = "stall"
    check = remote.metadata(case("host.notices=ec2", environ=service.environ("ec2")))
    assert check.status == "warn"
    assert "HttpPutResponseHopLimit=2" in check.advice


def test_a_metadata_service_that_is_switched_off(service, case):
    service.fault = "500"
    check = remote.metadata(case("host.notices=ec2", environ=service.environ("ec2")))
    assert (check.status, "--http-endpoint enabled" in check.advice) == ("warn", True)


@pytest.mark.parametrize("provider", ["gcp", "azure"])
def test_a_metadata_service_that_is_broken(service, case, provider):
    service.fault = "reset"
    check = remote.metadata(case(f"host.notices={provider}", environ=service.environ(provider)))
    assert (check.status, "--network host" in check.advice) == ("warn", True)


def test_without_a_metadata_service_nothing_is_said(case):
    assert remote.metadata(case()) is None


def test_any_answer_of_a_web_server_tells_its_time(service, case):
    service.skew = -7200.0
    assert remote.date_of(f"{service.address}/nothing/there") is not None
    one = case("tracking.uri=" + service.address + "/mlflow")
    remote.ask_clock(one)
    seconds, whose = one.skew
    assert seconds == pytest.approx(7200, abs=3)
    assert whose == service.address.removeprefix("http://")
    before = one.skew
    remote.ask_clock(one)
    assert one.skew is before


def test_a_server_that_is_away_tells_no_time(unused_address):
    assert remote.date_of(unused_address, 0.5) is None
    assert remote.date_of("file:///etc/hostname") is None


# --- the tracking server -------------------------------------------------------------------------------------------


def test_a_tracking_server_that_is_away_is_a_warning(case, unused_address):
    check = remote.tracking(case(f"tracking.uri={unused_address}"))
    assert (check.status, bool(check.advice)) == ("warn", True)


def test_no_tracking_server_is_fine(case):
    assert remote.tracking(case()).status == "pass"
