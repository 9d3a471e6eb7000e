"""The benchmark of `wmtp plan` runs, and what it compares is comparable."""

import pytest

from tests.conftest import TINY


@pytest.mark.usefixtures("one_thread")
def test_one_run(monkeypatch):
    monkeypatch.syspath_prepend("benchmarks")  # its neighbour `common`
    from benchmarks import plan

    monkeypatch.setattr(plan, "ROUNDS", 1)
    found = plan.one("smoke", TINY)
    assert 0.8 < found["memory ratio"] < 1.3
    assert found["time ratio"] > 0
