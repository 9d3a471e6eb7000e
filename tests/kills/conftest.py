"""The sum of what the struck processes of all tests came to."""

from collections import Counter

NAMES = ("kills", "stops", "stalls", "wipes", "torn", "lost", "wrong")


def pytest_terminal_summary(terminalreporter):
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    totals = Counter()
    for report in reports:
        totals.update({name: value for name, value in getattr(report, "user_properties", ()) if name in NAMES})
    if totals:
        terminalreporter.write_line("struck: " + ", ".join(f"{name} {totals[name]}" for name in NAMES))
