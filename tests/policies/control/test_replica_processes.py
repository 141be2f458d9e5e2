"""Replicas and a controller in processes of their own: what comes, goes or hangs is seen within 2 s.

The test is the router: it has its view of the loads, and places by it.
"""

import asyncio
import contextlib
import random
import signal

import pytest

from policies.modes import Mode
from policies.replica_load import Freshness
from router.load_view import LoadView
from router.placement import OwnTraffic, place
from tests.policies.control.processes import start_module
from tests.policies.helpers import eventually

SEEN_S = 2.0


@pytest.fixture
def start(server, app):
    """Starts a replica and waits until it has published; one at a time under each id."""
    with contextlib.ExitStack() as processes:
        processes.enter_context(start_module("controller_process", server.url, app, "a"))

        def start_replica(replica_id, num_in_flight):
            arguments = (server.url, app, replica_id, str(num_in_flight))
            return processes.enter_context(start_module("replica_process", *arguments))

        yield start_replica


@pytest.fixture
async def view(store):
    view = LoadView(store)
    reading = asyncio.create_task(view.run())
    yield view
    reading.cancel()


@pytest.fixture
def follows(store, view):
    """Waits until the replica runs the plan that the leader wrote for it, and the router sees it so."""

    async def follow(replica_id, mode):
        async def both():
            return (await store.read_view()).plans.get(replica_id), view.seen(replica_id)

        def agree(both):
            plan, seen = both
            if plan is None or plan.is_stale or seen is None or seen.freshness is not Freshness.FRESH:
                return False
            runs = (seen.load.decode, seen.load.plan_version)
            return runs == (plan.plan.decode, plan.plan.version) and plan.plan.decode.mode is mode

        plan, _ = await eventually(both, agree, SEEN_S)
        return plan.plan.version

    return follow


@pytest.fixture
def freshness(view):
    async def freshness_of(replica_id):
        seen = view.seen(replica_id)
        return None if seen is None else seen.freshness

    return freshness_of


def placed(view, *replica_ids):
    """Where each of twenty requests would go."""
    draws = random.Random(0)
    return {place(replica_ids, OwnTraffic(), view.seen, 0.0, draws) for _ in range(20)}


async def test_a_replica_that_comes_is_seen_and_has_a_plan(start, follows, view):
    start("r1", 20)
    assert await follows("r1", Mode.AR) >= 1
    start("r2", 1)
    assert await follows("r2", Mode.DIFFUSION) >= 1
    assert placed(view, "r1", "r2") == {"r2"}


async def test_a_killed_replica_is_passed_over(start, follows, freshness, view):
    start("busy", 20)
    idle = start("idle", 0)
    await follows("busy", Mode.AR)
    await follows("idle", Mode.DIFFUSION)
    assert placed(view, "busy", "idle") == {"idle"}
    idle.kill()
    await eventually(lambda: freshness("idle"), lambda seen: seen is not Freshness.FRESH, SEEN_S)
    assert placed(view, "busy", "idle") == {"busy"}


async def test_a_replica_that_leaves_is_gone_and_so_is_its_plan(start, follows, freshness, store):
    process = start("r1", 20)
    await follows("r1", Mode.AR)
    process.send_signal(signal.SIGTERM)
    await eventually(lambda: freshness("r1"), lambda seen: seen is None, SEEN_S)
    assert (await store.read_view()).plans == {}


@pytest.mark.parametrize("name", ["the same", "another"])
async def test_a_restarted_replica_gets_a_plan_for_its_new_load(start, follows, freshness, store, name):
    before = start("r1", 20)
    version = await follows("r1", Mode.AR)
    before.kill()
    again = "r1" if name == "the same" else "r2"
    start(again, 1)
    newer = await follows(again, Mode.DIFFUSION)
    assert newer > version if again == "r1" else newer >= 1
    decided = [record for record in await store.recent_decisions() if record.changed]
    assert decided[0].load.replica_id == again
    if again == "r2":
        await eventually(lambda: freshness("r1"), lambda seen: seen is not Freshness.FRESH, SEEN_S)


async def test_a_replica_that_hangs_is_passed_over_until_it_is_back(start, follows, freshness, view, store):
    start("busy", 20)
    hung = start("idle", 0)
    version = await follows("idle", Mode.DIFFUSION)
    await follows("busy", Mode.AR)
    hung.send_signal(signal.SIGSTOP)
    await eventually(lambda: freshness("idle"), lambda seen: seen is not Freshness.FRESH, SEEN_S)
    assert placed(view, "busy", "idle") == {"busy"}
    hung.send_signal(signal.SIGCONT)
    assert await follows("idle", Mode.DIFFUSION) == version  # nobody decided for it meanwhile
    assert placed(view, "busy", "idle") == {"idle"}
