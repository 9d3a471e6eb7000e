"""Processes struck at random lines, by seed, on every provider: nothing torn, nothing lost, the same bits in the end.

`scripts/kills.sh 1000` strikes a thousand times; the tests strike WMTP_KILLS times, 60 unless told otherwise.
"""

import os
from contextlib import contextmanager

import pytest

from tests.kills.campaign import Chain

KILLS = int(os.environ.get("WMTP_KILLS", "60"))
SEED = os.environ.get("WMTP_KILLS_SEED", "1")
A_CHAIN = 5
# a folder is quick, so it takes half of them
PROVIDERS = ("directory", "s3", "directory", "gcs", "directory", "azure")
CHAINS = [(number, PROVIDERS[number % len(PROVIDERS)]) for number in range(-(-KILLS // A_CHAIN))]


@pytest.fixture(scope="module")
def reference(tiny_run, run_record, tmp_path_factory):
    """What the run leaves that nobody disturbs."""
    workdir = tmp_path_factory.mktemp("reference")
    tiny_run(workdir)
    return run_record(workdir)


@contextmanager
def variables_set(variables):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("number", "provider"), CHAINS)
def test_struck(number, provider, request, tiny_settings, run_record, reference, record_property, tmp_path):
    server = request.getfixturevalue(f"{provider}_server")
    chain = Chain(server, tiny_settings, tmp_path, f"{SEED}/{number}", variables_set)
    for _ in range(4 * A_CHAIN):
        if chain.tally.strikes >= A_CHAIN:
            break
        chain.strike()
    tally = chain.finish(run_record, reference)
    for name in ("kills", "stops", "stalls", "wipes"):
        record_property(name, getattr(tally, name))
    for name in ("torn", "lost", "wrong"):
        record_property(name, len(getattr(tally, name)))
    assert tally.problems == []
