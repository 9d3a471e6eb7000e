"""The sum of what the struck processes of all tests came to, and where it stands while they go on."""

import os
import time
from collections import Counter

import pytest

STARTED = time.monotonic()
KINDS = ("signal", "phase", "disk", "provider", "way")
_totals: Counter[str] = Counter()
_strikes: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}


def _say_totals() -> str:
    signals = _strikes["signal"]
    stalls, kills = signals["SIGSTOP"], signals["SIGKILL"]
    told = {"kills": kills, "stops": signals.total() - kills - stalls, "stalls": stalls}
    told |= {name: _totals[name] for name in ("runs", "torn", "lost", "wrong")}
    return ", ".join(f"{name} {number}" for name, number in told.items())


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report):
    for name, found in report.user_properties if report.when == "call" else ():
        if name == "struck":
            _totals.update({key: value for key, value in found.items() if key != "strikes"})
            for *what, times in found["strikes"]:
                for kind, value in zip(KINDS, what, strict=True):
                    _strikes[kind][value] += times
            # a campaign of its own tells how it gets on, one line a chain
            if "WMTP_KILLS" in os.environ and "PYTEST_XDIST_WORKER" not in os.environ:
                print(f"\n{time.monotonic() - STARTED:5.0f} s  {_say_totals()}", end="", flush=True)


def pytest_terminal_summary(terminalreporter):
    if not _strikes["signal"]:
        return
    terminalreporter.write_line(f"struck: {_say_totals()}; not reached: {_totals['missed']}")
    for kind in KINDS:
        counts = ", ".join(f"{name} {number}" for name, number in sorted(_strikes[kind].items()))
        terminalreporter.write_line(f"  by {kind:8} {counts}")
