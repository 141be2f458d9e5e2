"""What the tests of the policies share."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from policies.policy import Decision, Policy, Snapshot
from policies.replica_load import ObservedLoad, ReplicaLoad

Seen = TypeVar("Seen")


def a_load(num_in_flight: int = 0, replica_id: str = "r1", **changes: Any) -> ReplicaLoad:
    """A replica with 8 places; what exceeds them waits."""
    num_running = min(num_in_flight, 8)
    values: dict[str, Any] = {
        "replica_id": replica_id,
        "num_running": num_running,
        "num_waiting": num_in_flight - num_running,
        "num_auto": num_in_flight,
        "max_running": 8,
        "pages_used": num_running,
        "num_pages": 100,
    }
    return ReplicaLoad(**{**values, **changes})


def observed(
    num_in_flight: int = 0, replica_id: str = "r1", age_s: float = 0.1, **changes: Any
) -> ObservedLoad:
    return ObservedLoad(a_load(num_in_flight, replica_id, **changes), age_s)


async def eventually(
    probe: Callable[[], Awaitable[Seen]], is_it: Callable[[Seen], object], timeout_s: float = 5.0
) -> Seen:
    """Probe until `is_it` holds of what is seen, and return that; fails after timeout_s."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        seen = await probe()
        if is_it(seen):
            return seen
        if time.monotonic() > deadline_s:
            raise AssertionError(f"not within {timeout_s} s; last seen: {seen!r}")
        await asyncio.sleep(0.02)


class FakeClock:
    """A clock that moves only when a test says so, or when something sleeps by it."""

    def __init__(self, now_s: float = 1000.0):
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        await asyncio.sleep(0)


def drive(
    policy: Policy[Any], arrivals: list[tuple[float, ReplicaLoad]], state: Any = None
) -> list[tuple[float, Decision]]:
    """The decision at each (time, load), the plan decided being in force from then on."""
    if state is None:
        state = policy.resume(None, 0.0, arrivals[0][0])
    current = None
    decisions = []
    for now_s, load in arrivals:
        decision, state = policy.decide(Snapshot(load, current), state, now_s)
        current = decision.decode
        decisions.append((now_s, decision))
    return decisions
