"""The sum of what the struck processes of all tests came to, and where it stands while they go on."""

import os
import time
from collections import Counter

KINDS = ("signal", "phase", "disk", "provider", "way")


class Sum:
    """Adds up what the tests recorded as `struck`; with WMTP_KILLS set it says after each chain how far it is."""

    def __init__(self, config):
        self._config = config
        self._started = time.monotonic()
        self._totals = Counter()
        self._strikes = {kind: Counter() for kind in KINDS}

    def pytest_runtest_logreport(self, report):
        for name, found in report.user_properties if report.when == "call" else ():
            if name == "struck":
                self._totals.update({key: value for key, value in found.items() if key != "strikes"})
                for *what, times in found["strikes"]:
                    for kind, value in zip(KINDS, what, strict=True):
                        self._strikes[kind][value] += times
                reporter = self._config.pluginmanager.get_plugin("terminalreporter")
                if reporter is not None and "WMTP_KILLS" in os.environ:
                    reporter.write(f"\n{time.monotonic() - self._started:6.0f} s  {self}  ", flush=True)

    def pytest_terminal_summary(self, terminalreporter):
        if self._strikes["signal"]:
            terminalreporter.write_line(f"struck: {self}")
        for kind, counts in self._strikes.items():
            told = ", ".join(f"{name} {number}" for name, number in sorted(counts.items()))
            if told:
                terminalreporter.write_line(f"  by {kind:8} {told}")

    def __str__(self):
        signals = self._strikes["signal"]
        stalls, kills = signals["SIGSTOP"], signals["SIGKILL"]
        told = {"kills": kills, "stops": signals.total() - kills - stalls, "stalls": stalls}
        told |= {name: self._totals[name] for name in ("runs", "torn", "lost", "wrong", "missed")}
        return ", ".join(f"{name} {number}" for name, number in told.items())


def pytest_configure(config):
    config.pluginmanager.register(Sum(config))
