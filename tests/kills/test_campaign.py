"""Processes struck at random lines, by seed, on every provider: nothing torn, nothing lost, the same bits in the end.

`scripts/kills.sh 1000` kills a thousand times; the tests kill WMTP_KILLS times, 60 unless told otherwise.
"""

import os
import signal
import time
from collections import Counter

import pytest

from tests.kills.campaign import STOPS, VARIATIONS, Chain, plan, reference_of
from tests.kills.strikes import PACKAGE, PHASES

KILLS = int(os.environ.get("WMTP_KILLS", "60"))
SEED = os.environ.get("WMTP_KILLS_SEED", "1")
# the time at which no more chains begin
UNTIL = float(os.environ.get("WMTP_KILLS_UNTIL", "inf"))
A_CHAIN = 5  # kills
# a folder is quick, so it takes half of them
PROVIDERS = ("directory", "s3", "directory", "gcs", "directory", "azure")
CHAINS = -(-KILLS // A_CHAIN)


@pytest.fixture(scope="module")
def undisturbed(tiny_settings, run_record, directory_server, tmp_path_factory):
    """By variation: what the run leaves that nobody disturbs, and how many lines of each phase it has."""
    found = {}

    def get(variation):
        if variation not in found:
            folder = tmp_path_factory.mktemp(f"undisturbed-{variation.name}")
            found[variation] = reference_of(variation, tiny_settings, directory_server, folder, run_record)
        return found[variation]

    return get


def plan_of(number):
    variation = VARIATIONS[number % len(VARIATIONS)]
    return variation, list(plan(number, A_CHAIN, SEED, variation.phases))


def test_the_phases_are_parts_of_the_worker():
    missing = [name for names in PHASES.values() for name in names if not (PACKAGE / name).exists()]
    assert missing == []


def test_every_phase_is_planned_to_be_killed_by_the_tests_alone():
    planned = [strike for number in range(12) for strike in plan_of(number)[1]]
    kills = Counter(phase for phase, number in planned if number == signal.SIGKILL)
    assert kills.total() == 60
    assert kills.keys() == PHASES.keys()
    assert {number for _, number in planned} == {signal.SIGKILL, signal.SIGSTOP, *STOPS}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", range(CHAINS))
def test_struck(number, request, tiny_settings, run_record, undisturbed, record_property, monkeypatch, tmp_path):
    if time.time() > UNTIL:
        pytest.skip("the time for it is over")
    provider = PROVIDERS[number % len(PROVIDERS)]
    server = request.getfixturevalue(f"{provider}_server")
    for name, value in server.environ.items():
        monkeypatch.setenv(name, value)
    variation, strikes = plan_of(number)
    reference, lines = undisturbed(variation)
    assert [phase for phase in variation.phases if not lines[phase]] == []
    chain = Chain(server, tiny_settings, variation, tmp_path, f"{SEED}/{number}", lines, run_record, reference)
    for phase, kind in strikes:
        chain.strike(phase, kind)
    tally = chain.finish()
    struck = [[*what, provider, variation.name, times] for what, times in tally.struck.items()]
    wrong = {"torn": len(tally.torn), "lost": len(tally.lost), "wrong": len(tally.wrong)}
    record_property("struck", {"strikes": struck, "missed": tally.missed, "runs": tally.runs, **wrong})
    assert tally.problems == []
    done = Counter((number, phase) for (number, phase, _), times in tally.struck.items() for _ in range(times))
    assert done == Counter((number.name, phase) for phase, number in strikes)
