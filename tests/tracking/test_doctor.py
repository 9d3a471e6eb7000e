"""What `wmtp doctor` says of a real tracking server."""

import pytest

from wmtp_worker.doctor.case import Case
from wmtp_worker.doctor.remote import tracking
from wmtp_worker.settings import load

# the server that the other tests use
pytestmark = pytest.mark.xdist_group("mlflow")


def look(server):
    return tracking(Case(load(preset="smoke", overrides=[f"tracking.uri={server.uri}"], environ={}), environ={}))


def test_a_server_that_takes_records(logged_in):
    check = look(logged_in)
    assert check.status == "pass", check


def test_a_server_that_refuses_us(logged_in, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "not-the-password")
    check = look(logged_in)
    assert (check.status, "MLFLOW_TRACKING_PASSWORD" in check.advice) == ("fail", True)
    assert "not-the-password" not in check.found
