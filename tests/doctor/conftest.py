"""A run of the smoke preset, and what the doctor says of it."""

import pytest

from wmtp_worker.doctor.case import Case
from wmtp_worker.settings import load


@pytest.fixture
def case(tmp_path):
    """`case("model.path=…", environ={…})`: a run in a work directory of its own, on a machine that is only files."""

    def make(*overrides, environ=None, variables=None):
        settings = load(
            preset="smoke", overrides=[f"run.workdir={tmp_path}/work", *overrides], environ=dict(variables or {})
        )
        return Case(settings, environ=environ or {}, root=tmp_path / "machine")

    return make
