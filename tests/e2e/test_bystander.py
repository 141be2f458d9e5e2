"""No request hurts another: bad and extreme requests of every kind, beside answers that must not change."""

import asyncio
from collections.abc import Iterator

import pytest

from benchmarks.fuzz import BYSTANDERS, barrage
from benchmarks.processes import Triad

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

NUM_CASES = 420
LONGEST_GAP_S = 5.0
"""Of a stream beside them all, on two cores that the clients share; a link is given up after 15 s."""


@pytest.fixture(scope="module")
def lone_server() -> Iterator[Triad]:
    """The default one: a single replica, so that whatever hurts it hurts every bystander."""
    with Triad() as server:
        yield server


def test_nobody_notices_bad_and_extreme_requests_of_others(lone_server: Triad) -> None:
    found = asyncio.run(barrage(lone_server.url, lone_server, NUM_CASES))
    assert found.problems == []
    assert sum(found.statuses.values()) >= NUM_CASES
    assert {"200", "400", "413", "504", "left"} <= set(found.statuses)
    assert all(found.bystanders[name] >= 3 for name in BYSTANDERS), found.bystanders
    assert found.longest_gap_s < LONGEST_GAP_S
