"""Faults staged against the real door, dispatcher, service and engine; Redis a real Valkey. docs/faults.md

The model is scripted, so that each fault comes at the very moment it should.
"""

import asyncio
import json
import time
from collections.abc import Sequence

import httpx
import pytest

import replicas.engine_thread
from replicas.engine.batch import ScheduledBatch, SegmentOutput
from router.api import create_app
from tests.eventually import eventually
from tests.replicas.engine.scripted import ScriptedRunner
from tests.router.conftest import over_http
from tests.router.faults import PATH, Gated, chat, served, streamed
from tests.router.stack import Stack, a_stack

pytestmark = pytest.mark.timeout(120)


def each_has(num_requests: int, stack: Stack, runners: Sequence[Gated]) -> bool:
    """The engine of each has so many; until then a forward ends only where a command waits for its end."""
    for replica, runner in zip(stack.replicas, runners, strict=True):
        if runner.is_waiting and replica.service._thread.has_commands:
            runner.allow(1)
    return all(replica.service.snapshot().num_in_flight == num_requests for replica in stack.replicas)


# The engine.


@pytest.mark.parametrize("error", [RuntimeError("kernel"), MemoryError("out of memory")])
async def test_a_forward_that_raises_fails_its_requests_and_no_others(error: Exception) -> None:
    runner = ScriptedRunner()
    async with served([runner]) as (_, client):
        runner.fail_next = error
        response = await client.post(PATH, json=chat())
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "internal_error"
        assert (await client.post(PATH, json=chat())).status_code == 200


async def test_in_mid_stream_a_failing_forward_is_an_error_event() -> None:
    runner = Gated()
    async with served([runner]) as (_, client):
        asking = asyncio.create_task(streamed(client, chat(decoding={"mode": "ar"})))
        runner.allow(5)
        await eventually(lambda: runner.num_begun == 6)
        runner.fail_next = MemoryError("out of memory")
        runner.allow()
        status, lines = await asking
        assert status == 200
        assert json.loads(lines[-1])["error"]["code"] == "internal_error"
        assert "[DONE]" not in lines


async def test_a_wedged_engine_is_found_by_the_health_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas.engine_thread, "WEDGED_S", 0.3)
    runner = Gated()
    async with served([runner]) as (stack, client):
        asking = asyncio.create_task(client.post(PATH, json=chat()))
        await eventually(lambda: runner.num_begun)

        def found() -> bool:
            try:
                stack.replicas[0].service.check()
            except RuntimeError as error:
                return "running for more than" in str(error)
            return False

        await eventually(found, every_s=0.02)
        # Routers see it long before: what it says is as old as the forward that hangs.
        assert stack.replicas[0].service.snapshot().silent_s > 0.3
        runner.allow()
        assert (await asking).status_code == 200
        stack.replicas[0].service.check()
        assert stack.replicas[0].service.snapshot().silent_s < 0.3


# Replicas.


async def test_before_its_first_token_a_request_survives_the_loss_of_its_replica() -> None:
    first, second = Gated(), Gated()
    async with (
        a_stack([first, second]) as stack,
        over_http(create_app(stack.door)) as url,
        httpx.AsyncClient(base_url=url, timeout=60.0) as client,
    ):
        waiting = [asyncio.create_task(streamed(client, chat(f"w{k}"))) for k in range(6)]
        await eventually(lambda: sum(stack.dispatcher.in_flight().values()) == 6)
        stack.replicas[0].kill()
        first.allow()
        second.allow()
        for status, lines in await asyncio.gather(*waiting):
            assert (status, lines[-1]) == (200, "[DONE]")


async def test_in_mid_stream_the_loss_of_a_replica_is_an_error_event_to_its_own_streams_only() -> None:
    runners = Gated(), Gated()
    async with (
        a_stack(runners) as stack,
        over_http(create_app(stack.door)) as url,
        httpx.AsyncClient(base_url=url, timeout=60.0) as client,
    ):
        # Of different prompts: the same one would follow its first to where that is cached.
        seen: list[list[str]] = [[] for _ in range(4)]
        streams = [
            asyncio.create_task(
                streamed(client, chat(f"stream {number}", decoding={"mode": "ar"}, max_tokens=60), lines)
            )
            for number, lines in enumerate(seen)
        ]
        await eventually(lambda: each_has(2, stack, runners))
        for runner in runners:
            runner.allow(8)
        await eventually(lambda: all(len(lines) > 1 for lines in seen))
        stack.replicas[0].kill()
        for runner in runners:
            runner.allow()
        ends = []
        for status, lines in await asyncio.gather(*streams):
            assert status == 200
            ends.append("done" if lines[-1] == "[DONE]" else json.loads(lines[-1])["error"]["code"])
        assert sorted(ends) == ["done", "done", "unavailable", "unavailable"]
        assert (await client.post(PATH, json=chat())).status_code == 200


async def test_while_it_drains_what_has_begun_goes_on_and_new_requests_get_503() -> None:
    runner = Gated()
    async with served([runner]) as (stack, client):
        begun = [asyncio.create_task(streamed(client, chat(f"b{k}"))) for k in range(3)]
        await eventually(lambda: sum(stack.dispatcher.in_flight().values()) == 3)
        stack.dispatcher.drain()
        for is_streamed in (False, True):
            response = await client.post(PATH, json=chat(stream=is_streamed))
            assert (response.status_code, response.headers["retry-after"] in ("1", "2")) == (503, True)
        assert (await client.get("/readyz")).status_code == 503
        assert (await client.get("/healthz")).status_code == 200
        runner.allow()
        for status, lines in await asyncio.gather(*begun):
            assert (status, lines[-1]) == (200, "[DONE]")


# Clients.


@pytest.mark.parametrize("stage", ["queued", "prefill", "streaming"])
async def test_a_client_that_goes_frees_all_it_had(stage: str) -> None:
    runner = Gated()
    async with served([runner], limits={"max_running": 1}) as (stack, client):
        first = asyncio.create_task(streamed(client, chat("first")))
        await eventually(lambda: runner.num_begun)
        gone = first
        if stage == "queued":
            gone = asyncio.create_task(streamed(client, chat("second")))
            await eventually(lambda: stack.replicas[0].service.snapshot().num_waiting == 1)
        if stage == "streaming":
            runner.allow(4)
            await eventually(lambda: runner.num_begun == 5)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        await eventually(lambda: sum(stack.dispatcher.in_flight().values()) == (stage == "queued"))
        runner.allow()
        if stage == "queued":
            assert (await first)[1][-1] == "[DONE]"


async def test_a_slow_reader_holds_nobody_up() -> None:
    async with served() as (stack, client):
        body = chat(stream=True, max_tokens=60)
        async with client.stream("POST", PATH, json=body) as slow:
            received = slow.aiter_lines()
            await anext(received)
            for _ in range(5):
                assert (await client.post(PATH, json=chat())).status_code == 200
            await stack.settled()  # the slow one's too: its tokens are made, and wait for it
            assert "data: [DONE]" in [line async for line in received]


async def test_ten_times_too_much_is_shed_and_the_rest_served() -> None:
    limits = {"max_running": 4, "max_waiting": 4}
    runner = Gated()
    async with served([runner], limits=limits) as (_stack, client):
        asked = [asyncio.create_task(client.post(PATH, json=chat(f"r{k}"))) for k in range(80)]
        await eventually(lambda: sum(task.done() for task in asked) >= 60, within_s=30.0)
        runner.allow()
        answers = await asyncio.gather(*asked)
        shed = [answer for answer in answers if answer.status_code != 200]
        assert len(answers) - len(shed) == 8
        for answer in shed:
            assert answer.status_code in (429, 503)
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["code"] in ("queue_full", "unavailable")


async def test_overload_makes_no_forward_less_full() -> None:
    """Goodput in tokens a forward, by 4 clients and by 40; a forward takes its time, as a model's does."""

    class Slow(ScriptedRunner):
        def run(self, batch: ScheduledBatch) -> list[SegmentOutput]:
            time.sleep(0.01)
            return super().run(batch)

    limits = {"max_running": 4, "max_waiting": 4}

    async def tokens_a_forward(num_clients: int) -> float:
        runner = Slow()
        num_served = 0
        async with served([runner], limits=limits) as (_, client):

            async def ask_on() -> None:
                nonlocal num_served
                while num_served < 20:
                    response = await client.post(PATH, json=chat(decoding={"mode": "ar"}))
                    assert response.status_code in (200, 429)
                    num_served += response.status_code == 200

            await asyncio.gather(*(ask_on() for _ in range(num_clients)))
        return num_served * 30 / runner.num_forwards

    peak = await tokens_a_forward(4)
    assert await tokens_a_forward(40) > 0.8 * peak


async def test_a_thousand_idle_connections_cost_nobody_an_answer() -> None:
    async with served() as (_, client):
        url = httpx.URL(str(client.base_url))
        idle = []
        try:
            for _ in range(1000):
                idle.append(await asyncio.open_connection(url.host, url.port))
            assert (await client.post(PATH, json=chat())).status_code == 200
            assert (await streamed(client, chat()))[1][-1] == "[DONE]"
        finally:
            for _, writer in idle:
                writer.close()


async def test_a_very_long_prompt_is_a_400_and_soon() -> None:
    async with served() as (_, client):
        for size, status in ((200, 400), (100_000, 400), (2_000_000, 400), (9 * 2**20, 413)):
            assert (await client.post(PATH, json=chat("x" * size))).status_code == status
        assert (await client.post(PATH, json=chat())).status_code == 200


async def test_a_deadline_passes_in_the_queue_and_in_mid_stream() -> None:
    runner = Gated()
    async with served([runner], limits={"max_running": 1}) as (stack, client):
        began = asyncio.create_task(
            streamed(client, chat("a", timeout_s=1.0, decoding={"mode": "ar"}, max_tokens=60))
        )
        await eventually(lambda: runner.num_begun)
        queued = asyncio.create_task(client.post(PATH, json=chat("b", timeout_s=0.2)))

        await eventually(lambda: each_has(2, stack, [runner]))
        await asyncio.sleep(1.2)
        runner.allow()
        status, lines = await began
        assert (status, json.loads(lines[-1])["error"]["code"]) == (200, "deadline_exceeded")
        assert (await queued).status_code == 504
