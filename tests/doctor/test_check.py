"""How checks are made: in time, none hiding another, nothing secret."""

import threading
import time

import pytest

from wmtp_worker.doctor.check import Check, Probe, examine
from wmtp_worker.errors import Interrupted, SettingsError


def good(name):
    return Probe(name, lambda: Check(name, "pass", "fine"))


def raises(error):
    def look():
        raise error

    return look


def test_one_that_fails_never_hides_the_others():
    probes = [
        Probe("ours", raises(SettingsError("it is wrong", where="a file", fix="put it right"))),
        Probe("theirs", raises(KeyError("a bug of a library"))),
        Probe("says nothing", lambda: None),
        good("last"),
    ]
    ours, theirs, last = examine(probes)
    assert (ours.status, ours.found, ours.advice) == ("fail", "it is wrong (from a file)", "put it right")
    assert (theirs.status, "KeyError" in theirs.found) == ("warn", True)
    assert last.status == "pass"


@pytest.mark.parametrize("late", ["warn", "fail"])
def test_one_that_hangs_is_given_up(late):
    forever = threading.Event()
    began = time.monotonic()
    hangs, last = examine([Probe("hangs", forever.wait, seconds=0.2, late=late), good("last")])
    assert time.monotonic() - began < 30
    assert (hangs.status, hangs.found, last.status) == (late, "no answer within 0.2 s", "pass")
    forever.set()


def test_a_stop_is_heeded_in_the_middle_of_a_check():
    forever = threading.Event()
    asked = []

    def poll():
        asked.append(1)
        if len(asked) > 3:
            raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        list(examine([Probe("hangs", forever.wait, seconds=60)], poll))
    forever.set()


def test_no_secret_is_told(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden-value")
    probes = [
        Probe("found", lambda: Check("found", "warn", "hidden-value", "not hidden-value")),
        Probe("raised", raises(ValueError("hidden-value"))),
        Probe("ours", raises(SettingsError("hidden-value", where="hidden-value", fix="hidden-value"))),
    ]
    assert "hidden-value" not in repr(list(examine(probes)))
