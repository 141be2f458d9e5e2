"""Two Ray nodes on this machine, of which one is lost with the replica on it."""

import asyncio
import re
from collections.abc import AsyncIterator

import httpx
import pytest

from tests.e2e.clients import all_fresh, chat, complete, state_of, stream, text_of
from tests.e2e.host import Host
from tests.eventually import eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


@pytest.fixture
async def two_nodes(host: Host) -> AsyncIterator[httpx.AsyncClient]:
    """Two ingresses and one replica, which fill the first node, and one replica on the second."""
    host.serve("num_replicas=2", "num_ingresses=2", "replica_cpus=1.2", "num_threads=1", "policy=ar")
    await eventually(lambda: len(host.pids("ServeReplica:triad:Ingress")) == 2, within_s=60, every_s=0.1)
    assert len(host.pids("ServeReplica:triad:Replica")) == 1
    await asyncio.to_thread(host.add_node)
    async with httpx.AsyncClient(base_url=host.url, timeout=120.0) as client:
        await eventually(lambda: all_fresh(client), within_s=120, every_s=0.2, what="both replicas")
        yield client


async def test_a_lost_node_takes_its_own_streams_only_and_the_service_goes_on(
    two_nodes: httpx.AsyncClient, host: Host
) -> None:
    client = two_nodes
    body = chat("Write a short story about Anna.", max_tokens=900, decoding={"mode": "ar"})
    whole = chat("Write a short story about a fox.", max_tokens=200, decoding={"mode": "ar"})
    expected, expected_whole = await stream(client, body), await complete(client, whole)

    scraped = (await client.get("/metrics")).text
    assert len(set(re.findall(r'triad_redis_up{ingress="(\w+)"} 1', scraped))) == 2

    begun = [asyncio.create_task(stream(client, body)) for _ in range(6)]
    wholes = [asyncio.create_task(complete(client, whole)) for _ in range(4)]

    async def spread() -> bool:
        return all(r["load"]["num_running"] >= 2 for r in (await state_of(client))["replicas"])

    await eventually(spread, within_s=30, every_s=0.02)
    losing = asyncio.create_task(asyncio.to_thread(host.lose_node))

    ended = await asyncio.gather(*begun)
    await losing
    broken = [streamed for streamed in ended if streamed.error is not None]
    assert 0 < len(broken) < len(ended)
    for streamed in ended:
        if streamed.error is None:
            assert streamed.done
            assert streamed.text == expected.text
        else:
            assert streamed.error["code"] == "unavailable"
            assert expected.text.startswith(streamed.text)
    assert {text_of(a) for a in await asyncio.gather(*wholes)} == {text_of(expected_whole)}

    survivors = {(await complete(client, whole))["decoding"]["replica"] for _ in range(4)}
    assert len(survivors) == 1
