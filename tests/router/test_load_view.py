"""What a router knows without asking: it ages, and past its use the router's own counts decide."""

import asyncio
import random

import pytest

from cluster.embedded_redis import EmbeddedRedis
from policies.control.store import LoadStore
from policies.replica_load import ClusterLoad, Freshness, ObservedLoad
from router.load_view import LoadView
from router.placement import OwnTraffic, place
from tests.eventually import eventually
from tests.policies.helpers import FakeClock, a_load
from tests.redis_commands import commands_while
from tests.router.conftest import running
from tests.router.fakes import FakeStore
from tests.router.faults import PATH, chat, served
from tests.stores import patient_store


@pytest.mark.parametrize(
    ("later_s", "freshness"),
    [(0.5, Freshness.FRESH), (1.5, Freshness.STALE), (4.9, Freshness.STALE), (6.0, Freshness.LOST)],
)
async def test_without_a_store_what_was_read_goes_stale_and_is_lost(later_s, freshness):
    valkey = EmbeddedRedis.start()
    store, clock = LoadStore(valkey.url), FakeClock()
    view = LoadView(store, clock=clock)
    for replica_id, num in (("a", 4), ("b", 1)):
        await store.publish_and_read(a_load(num, replica_id))
    await view.refresh()
    valkey.stop()
    clock.now_s += later_s
    await view.refresh()
    assert view.store_error is not None
    assert {seen.freshness for seen in view.loads()} == {freshness}

    traffic = OwnTraffic()
    traffic.started("b", clock.now_s)
    chosen = place(["a", "b"], traffic, view.seen, clock.now_s, random.Random(0))
    assert chosen == ("a" if freshness is Freshness.LOST else "b")  # lost, a's four requests say nothing
    await store.close()


async def test_what_another_reader_passes_on_is_not_read_again():
    clock, slept = FakeClock(), asyncio.Event()

    async def sleep(seconds: float) -> None:
        clock.now_s += seconds
        slept.set()
        await asyncio.sleep(0)

    class Counted(FakeStore):
        num_reads = 0

        async def read_loads(self) -> ClusterLoad:
            self.num_reads += 1
            return ClusterLoad((ObservedLoad(a_load(1, "read"), 0.0),))

    store = Counted()
    view = LoadView(store, clock=clock, sleep=sleep)
    async with running(view.run()):
        for _ in range(10):
            view.take(ClusterLoad((ObservedLoad(a_load(1, "taken"), 0.0),)), clock.now_s)
            slept.clear()
            await slept.wait()
        assert store.num_reads <= 1  # the first may have come before anything was passed on
        assert [seen.load.replica_id for seen in view.loads()] == ["taken"]
        await eventually(lambda: [seen.load.replica_id for seen in view.loads()] == ["read"])


async def test_a_request_costs_redis_nothing():
    """Fifty requests and none: the router sends the readings of its view alone, one a period."""
    valkey = EmbeddedRedis.start()
    store = patient_store(valkey.url)
    async with served(store=store) as (stack, client):
        await store.publish_and_read(stack.replicas[0].service.snapshot())
        await eventually(lambda: stack.door.view.loads())

        async def ask() -> None:
            for _ in range(50):
                assert (await client.post(PATH, json=chat())).status_code == 200

        commands, elapsed_s = await commands_while(valkey.url, ask())
        assert 1 <= len(commands) <= elapsed_s / 0.2 + 2
        assert {command.split(maxsplit=1)[0] for command in commands} == {"EVAL"}
        assert all("ZRANGEBYSCORE" in command for command in commands)
    await store.close()
    valkey.stop()
