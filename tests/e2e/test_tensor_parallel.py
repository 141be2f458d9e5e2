"""A replica of two processes: the tokens of one, and when one of the two dies, another replica."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator

import httpx
import pytest

from tests.e2e.clients import Streamed, all_fresh, chat, complete, state_of, stream, text_of, total
from tests.e2e.conftest import TWO_REPLICAS
from tests.e2e.host import Host
from tests.eventually import eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

PROMPTS = ["Sort these numbers from small to large: 41, 7, 23, 5, 98.", "Write a short story about a fox."]
WORKER = "ray::TensorParallelWorker"


MODES = ["ar", "diffusion", "self_speculation"]
GREEDY: dict[str, object] = {}
SAMPLED: dict[str, object] = {"temperature": 0.7, "seed": 3, "max_tokens": 20}


@pytest.fixture(scope="module")
def texts_of_one(host: Host) -> dict[str, list[str]]:
    """What replicas of one process say, by mode, asked before they give way to the split one."""

    async def ask() -> dict[str, list[str]]:
        async with httpx.AsyncClient(base_url=host.url, timeout=120.0) as client:
            return {mode: await texts(client, mode) for mode in MODES}

    host.serve(*TWO_REPLICAS)
    return asyncio.run(ask())


@pytest.fixture
def split_server(host: Host, texts_of_one: dict[str, list[str]]) -> Host:
    """One replica, in two processes."""
    return host.serve("tensor_parallel=2", "calibration_s=0.2", "num_threads=1")


@pytest.fixture
async def split_client(split_server: Host) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=split_server.url, timeout=120.0) as client:
        yield client


async def texts(client: httpx.AsyncClient, mode: str) -> list[str]:
    """The texts of all prompts, greedy and sampled."""
    bodies = [chat(p, decoding={"mode": mode}, **more) for more in (GREEDY, SAMPLED) for p in PROMPTS]
    return [text_of(answer) for answer in await asyncio.gather(*(complete(client, b) for b in bodies))]


@pytest.mark.parametrize("mode", MODES)
async def test_two_processes_give_the_tokens_of_one(
    texts_of_one: dict[str, list[str]], split_client: httpx.AsyncClient, split_server: Host, mode: str
) -> None:
    assert len(split_server.pids(WORKER)) == 1
    assert await texts(split_client, mode) == texts_of_one[mode]


async def test_a_dead_worker_ends_its_replica_and_another_takes_over(
    split_client: httpx.AsyncClient, split_server: Host
) -> None:
    ask = chat(PROMPTS[0], decoding={"mode": "ar"})
    expected = text_of(await complete(split_client, ask))
    state = await eventually(lambda: all_fresh(split_client, num_replicas=1), within_s=60, every_s=0.1)
    (before,) = [replica["replica"] for replica in state["replicas"]]
    (worker,) = split_server.pids(WORKER)
    (leader,) = split_server.pids("ServeReplica:triad:Replica")
    body = chat(PROMPTS[1], max_tokens=900, decoding={"mode": "ar"})
    begun = [asyncio.create_task(stream(split_client, body)) for _ in range(3)]

    async def all_run() -> bool:
        return await total(split_client, "num_running") == 3

    await eventually(all_run, within_s=30, every_s=0.02)
    os.kill(worker, signal.SIGKILL)

    streams: list[Streamed] = await asyncio.wait_for(asyncio.gather(*begun), 60)
    for streamed in streams:
        assert streamed.error is not None
        assert not streamed.done

    async def replaced() -> bool:
        replicas = (await state_of(split_client))["replicas"]
        fresh = [replica["replica"] for replica in replicas if replica["freshness"] == "fresh"]
        reached = (await split_client.get("/readyz")).status_code == 200
        return reached and len(fresh) == 1 and fresh != [before]

    await eventually(replaced, within_s=120, every_s=0.5)
    assert text_of(await complete(split_client, ask)) == expected
    assert worker not in split_server.pids(WORKER)
    assert leader not in split_server.pids("ServeReplica:triad:Replica")
