"""Serve starts a replica where requests would be late, and stops one after the rush; no stream breaks."""

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest

from tests.e2e.clients import Streamed, chat, complete, state_of, stream, text_of
from tests.e2e.host import Host
from tests.eventually import eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

MAX_RUNNING = 8
PROMPT = "Write a short story about a fox."
REPLICA = "ServeReplica:triad:Replica"


@pytest.fixture
def scaled_server(host: Host) -> Host:
    """One replica, or two where more run than one has places for; a pace that no CPU misses."""
    return host.serve(
        "max_replicas=2",
        "target_ttft_s=60",
        "target_tpot_s=10",
        "upscale_delay_s=0.5",
        "downscale_delay_s=2",
        f"max_running={MAX_RUNNING}",
        "calibration_s=0.2",
        "policy=ar",
    )


@pytest.fixture
async def scaled_client(scaled_server: Host) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=scaled_server.url, timeout=120.0) as client:
        yield client


async def test_the_number_of_replicas_follows_the_load_and_streams_go_on(
    scaled_client: httpx.AsyncClient, scaled_server: Host
) -> None:
    body = chat(PROMPT, max_tokens=700)
    expected = text_of(await complete(scaled_client, body))
    assert len(scaled_server.pids(REPLICA)) == 1

    async def reachable() -> list[str]:
        """The replicas that the router has a channel to."""
        return sorted((await state_of(scaled_client))["router"]["in_flight"])

    is_over = {"the rush": asyncio.Event(), "all": asyncio.Event()}

    async def work(until: asyncio.Event) -> list[Streamed]:
        streams = []
        while not until.is_set():
            streams.append(await stream(scaled_client, body))
        return streams

    (first,) = await reachable()
    rush = [asyncio.create_task(work(is_over["the rush"])) for _ in range(2 * MAX_RUNNING - 2)]
    steady = [asyncio.create_task(work(is_over["all"])) for _ in range(2)]

    async def both_work() -> bool:
        in_flight = (await state_of(scaled_client))["router"]["in_flight"]
        return len(in_flight) == 2 and all(in_flight.values())

    await eventually(both_work, within_s=120, every_s=0.2, what="a second replica at work")
    is_over["the rush"].set()
    streams = [streamed for done in await asyncio.gather(*rush) for streamed in done]

    async def one_is_left() -> bool:
        return len(await reachable()) == 1 and len(scaled_server.pids(REPLICA)) == 1

    await eventually(one_is_left, within_s=120, every_s=0.2, what="one replica again")
    is_over["all"].set()
    streams += [streamed for done in await asyncio.gather(*steady) for streamed in done]

    by_replica: dict[str, int] = {}
    for streamed in streams:
        assert streamed.error is None
        assert streamed.done
        assert streamed.text == expected
        assert streamed.last is not None
        name = streamed.last["decoding"]["replica"]
        by_replica[name] = by_replica.get(name, 0) + 1
    assert first in by_replica
    assert len(by_replica) == 2
