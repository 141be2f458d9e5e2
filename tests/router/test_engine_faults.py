"""A replica whose engine has died, and requests at fault, seen through the door."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from replicas.engine.batch import ScheduledBatch, SegmentOutput
from router.api import create_app
from tests.eventually import eventually
from tests.replicas.engine.scripted import ScriptedRunner
from tests.router.conftest import over_http
from tests.router.faults import PATH, chat, served, streamed
from tests.router.stack import Stack, a_stack

pytestmark = pytest.mark.timeout(120)


class Sick(ScriptedRunner):
    """Fails every forward while it has an error; and always one that has this many tokens in its prompt."""

    def __init__(self, guilty_prompt_len: int | None = None) -> None:
        super().__init__()
        self.error: Exception | None = None
        self._guilty_prompt_len = guilty_prompt_len

    def run(self, batch: ScheduledBatch) -> list[SegmentOutput]:
        if self.error is not None:
            raise self.error
        if any(segment.prompt_len == self._guilty_prompt_len for segment in batch.segments):
            raise ValueError("this prompt can't be run")
        return super().run(batch)


@asynccontextmanager
async def behind_a_door(*runners: ScriptedRunner) -> AsyncIterator[tuple[Stack, httpx.AsyncClient]]:
    async with (
        a_stack(runners) as stack,
        over_http(create_app(stack.door)) as url,
        httpx.AsyncClient(base_url=url, timeout=60.0) as client,
    ):
        yield stack, client


ERRORS = [MemoryError("no memory"), RuntimeError("CUDA error: an illegal memory access was encountered")]


@pytest.mark.parametrize("error", ERRORS)
async def test_where_no_engine_lives_the_server_is_not_ready(error: Exception) -> None:
    sick = Sick()
    async with behind_a_door(sick) as (stack, client):
        assert (await client.get("/readyz")).status_code == 200
        sick.error = error
        response = await client.post(PATH, json=chat())
        assert response.status_code in (500, 503)
        await eventually(lambda: not stack.dispatcher.ready)
        assert (await client.get("/readyz")).status_code == 503
        for _ in range(3):
            assert (await client.post(PATH, json=chat())).status_code == 503
        with pytest.raises(RuntimeError, match="died"):
            stack.replicas[0].service.check()


@pytest.mark.parametrize("error", ERRORS)
async def test_a_sick_replica_is_not_placed_to_though_it_looks_the_emptiest(error: Exception) -> None:
    sick, sound = Sick(), ScriptedRunner()
    async with behind_a_door(sick, sound) as (stack, client):
        sick.error = error
        first = await asyncio.gather(*(client.post(PATH, json=chat(f"first {k}")) for k in range(8)))
        assert {response.status_code for response in first} <= {200, 500}
        for number in range(40):
            response = await client.post(PATH, json=chat(f"then {number}"))
            assert response.status_code == 200
        assert (await client.get("/readyz")).status_code == 200
        await eventually(lambda: sum(stack.dispatcher.in_flight().values()) == 0)


async def test_a_prompt_that_can_not_be_run_ends_its_own_request_alone() -> None:
    alone = Sick()
    async with served([alone]) as (_, client):
        _, expected = await streamed(client, chat("bystander", max_tokens=60))
        length = json.loads((await client.post(PATH, json=chat("guilty"))).text)["usage"]["prompt_tokens"]
        other = json.loads((await client.post(PATH, json=chat("bystander"))).text)["usage"]["prompt_tokens"]
    assert length != other
    runner = Sick(guilty_prompt_len=length)
    async with served([runner]) as (stack, client):
        bystanders = [
            asyncio.create_task(streamed(client, chat("bystander", max_tokens=60))) for _ in range(4)
        ]
        for _ in range(6):
            response = await client.post(PATH, json=chat("guilty"))
            assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
        for status, lines in await asyncio.gather(*bystanders):
            assert status == 200
            assert text_of(lines) == text_of(expected)
        stack.replicas[0].service.check()


def text_of(lines: list[str]) -> str:
    events = [json.loads(line) for line in lines if line != "[DONE]"]
    return "".join(event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"])
