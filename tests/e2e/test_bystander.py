"""No request hurts another: bad and extreme requests of every kind, beside answers that must not change."""

import asyncio

import pytest

from benchmarks.fuzz import BYSTANDERS, barrage
from tests.e2e.host import Host

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

NUM_CASES = 420
LONGEST_GAP_S = 5.0
"""Of a stream beside them all, on two cores that the clients share; a link is given up after 15 s."""


@pytest.fixture
def lone_server(host: Host) -> Host:
    """The default one: a single replica, so that whatever hurts it hurts every bystander."""
    return host.serve()


def test_nobody_notices_bad_and_extreme_requests_of_others(lone_server: Host) -> None:
    found = asyncio.run(barrage(lone_server.url, lone_server, NUM_CASES))
    assert found.problems == []
    assert sum(found.statuses.values()) >= NUM_CASES
    assert {"200", "400", "413", "504", "left"} <= set(found.statuses)
    assert all(found.bystanders[name] >= 3 for name in BYSTANDERS), found.bystanders
    assert found.longest_gap_s < LONGEST_GAP_S
