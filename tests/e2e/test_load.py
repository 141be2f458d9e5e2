"""`auto` follows the load, and no fault of Valkey or of a replica harms a request it need not harm."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from tests.e2e.clients import Streamed, all_fresh, chat, complete, state_of, stream, text_of
from tests.e2e.host import Host
from tests.eventually import eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

NUM_CLIENTS = 16
NUM_TOKENS = 256
"""Long enough that clients which wait their turn for a CPU still keep the replicas full."""
PROMPTS = [f"Write a short story about {name}." for name in ("Anna", "a fox", "the sea", "two trains")]


async def plans_are(client: httpx.AsyncClient, mode: str) -> bool:
    """Both replicas are told to run this mode."""
    state = await all_fresh(client)
    return state is not None and {mode_of(r["plan"]) for r in state["replicas"]} == {mode}


def mode_of(decided: dict) -> str:
    mode: str = decided["plan"]["decode"]["mode"]
    return mode


@contextmanager
def in_a_loop(client: httpx.AsyncClient, body: dict) -> Iterator[list[Streamed]]:
    """One client that streams one request after another; yields what has ended so far."""
    ended: list[Streamed] = []

    async def loop() -> None:
        while True:
            ended.append(await stream(client, body))

    task = asyncio.create_task(loop())
    try:
        yield ended
        assert not task.done(), task.result()
    finally:
        task.cancel()


async def texts_alone(client: httpx.AsyncClient, bodies: list[dict]) -> list[str]:
    """Each request's text when nothing else runs, as AR writes it."""
    return [text_of(await complete(client, body | {"decoding": {"mode": "ar"}})) for body in bodies]


async def test_auto_shifts_with_the_load_and_back(client: httpx.AsyncClient) -> None:
    """Half the clients ask for lossless answers, whose text must be AR's, switch or no switch."""
    lossless = [chat(p, max_tokens=NUM_TOKENS, decoding={"lossless": True}) for p in PROMPTS]
    expected = await texts_alone(client, lossless)
    await eventually(lambda: plans_are(client, "diffusion"), within_s=20, every_s=0.1)

    with in_a_loop(client, chat(PROMPTS[0])) as ended:
        await eventually(lambda: len(ended) >= 3, within_s=60, every_s=0.05)
        assert ended[-1].modes == {"diffusion"}
        assert await plans_are(client, "diffusion")

    has_shifted = asyncio.Event()

    async def work(number: int) -> list[Streamed]:
        """Until the shift, and one request after it."""
        body = (
            chat(PROMPTS[0], max_tokens=NUM_TOKENS) if number % 2 else lossless[number // 2 % len(lossless)]
        )
        streams = []
        while not has_shifted.is_set():
            streams.append(await stream(client, body))
        return [*streams, await stream(client, body)]

    began_s = time.time()
    workers = [asyncio.create_task(work(number)) for number in range(NUM_CLIENTS)]
    await eventually(lambda: plans_are(client, "ar"), within_s=20, every_s=0.02)
    # By the log of decisions, on the same machine's clock: this process, busy with its clients, sees
    # the shift later than it happens.
    shifts = [d for d in (await state_of(client))["decisions"] if d["changed"] and d["at_s"] >= began_s]
    shifted_s = {d["load"]["replica_id"]: d["at_s"] for d in reversed(shifts) if mode_of(d) == "ar"}
    has_shifted.set()

    by_client = await asyncio.gather(*workers)
    for number, streams in enumerate(by_client):
        for streamed in streams:
            assert streamed.done
            assert streamed.error is None
            assert streamed.usage is not None
            assert streamed.usage["completion_tokens"] == NUM_TOKENS
            if number % 2 == 0:
                assert streamed.modes <= {"ar", "self_speculation"}
                assert streamed.text == expected[number // 2 % len(lossless)]
        assert any("ar" in streamed.modes for streamed in streams)
    # Whatever was under way at the shift took it in its stride.
    assert any(s.last is not None and s.last["decoding"]["switches"] > 0 for ss in by_client for s in ss)
    assert len(shifted_s) == 2
    assert max(shifted_s.values()) - began_s < 2.0, [(mode_of(d), d["at_s"] - began_s) for d in shifts]
    await eventually(lambda: plans_are(client, "diffusion"), within_s=20, every_s=0.1)


async def test_a_killed_valkey_fails_no_request_and_the_loop_resumes(
    client: httpx.AsyncClient, server: Host
) -> None:
    body = chat(PROMPTS[1], max_tokens=64, decoding={"lossless": True})
    (expected,) = await texts_alone(client, [body])
    (valkey,) = server.pids("valkey-server")

    async def work() -> list[Streamed]:
        return [await stream(client, body) for _ in range(4)]

    workers = [asyncio.create_task(work()) for _ in range(6)]

    async def under_load() -> bool:
        return sum((await state_of(client))["router"]["in_flight"].values()) >= 4

    await eventually(under_load, within_s=20)
    os.kill(valkey, signal.SIGKILL)
    for streams in await asyncio.gather(*workers):
        for streamed in streams:
            assert streamed.error is None
            assert streamed.done
            assert streamed.text == expected

    await eventually(lambda: all_fresh(client), within_s=20, every_s=0.1)
    assert server.pids("valkey-server") not in ([], [valkey])


async def test_a_killed_replica_harms_only_what_it_had_begun(client: httpx.AsyncClient, server: Host) -> None:
    body = chat(PROMPTS[2], max_tokens=900, decoding={"mode": "ar"})
    whole = chat(PROMPTS[3], max_tokens=100, decoding={"mode": "ar"})
    expected, expected_whole = await texts_alone(client, [body, whole])
    replicas = server.pids("ServeReplica:triad:Replica")
    assert len(replicas) == 2

    begun = [asyncio.create_task(stream(client, body)) for _ in range(6)]
    wholes = [asyncio.create_task(complete(client, whole)) for _ in range(6)]

    async def spread() -> bool:
        return all(r["load"]["num_running"] >= 2 for r in (await state_of(client))["replicas"])

    await eventually(spread, within_s=30, every_s=0.05)
    os.kill(replicas[0], signal.SIGKILL)

    streams = await asyncio.gather(*begun)
    broken = [s for s in streams if s.error is not None]
    assert 0 < len(broken) < len(streams)
    for streamed in streams:
        if streamed.error is None:
            assert streamed.done
            assert streamed.text == expected
        else:
            assert streamed.error["code"] == "unavailable"
            assert not streamed.done
            assert expected.startswith(streamed.text)
    assert [text_of(answer) for answer in await asyncio.gather(*wholes)] == [expected_whole] * 6

    async def both_are_back() -> bool:
        state = await state_of(client)
        fresh = [r["replica"] for r in state["replicas"] if r["freshness"] == "fresh"]
        return len(fresh) == 2 and sorted(fresh) == sorted(state["router"]["in_flight"])

    await eventually(both_are_back, within_s=200, every_s=0.5)
    answers = await asyncio.gather(*(complete(client, whole) for _ in range(8)))
    assert len({answer["decoding"]["replica"] for answer in answers}) == 2


async def streamed_until_cut(client: httpx.AsyncClient, body: dict) -> Streamed | httpx.HTTPError | int:
    """The error where the connection was cut, or the status where it was not 200."""
    try:
        return await stream(client, body)
    except httpx.HTTPStatusError as error:
        return error.response.status_code
    except httpx.HTTPError as error:
        return error


async def test_a_killed_ingress_cuts_its_connections_and_leaves_nothing_behind(
    client: httpx.AsyncClient, server: Host
) -> None:
    await eventually(lambda: all_fresh(client), within_s=60, every_s=0.1)
    body = chat(PROMPTS[2], max_tokens=900, decoding={"mode": "ar"})
    (ingress,) = server.pids("ServeReplica:triad:Ingress")
    leader = (await state_of(client))["leader"]
    begun = [asyncio.create_task(streamed_until_cut(client, body)) for _ in range(8)]

    async def all_run() -> bool:
        return sum(r["load"]["num_running"] for r in (await state_of(client))["replicas"]) == 8

    await eventually(all_run, within_s=30, every_s=0.02)
    killed_s = time.monotonic()
    os.kill(ingress, signal.SIGKILL)
    ends = await asyncio.gather(*begun)
    # Nobody takes the cut for an end.
    assert [end for end in ends if isinstance(end, Streamed) and end.done] == []
    assert time.monotonic() - killed_s < 20.0

    async def is_back() -> dict | None:
        try:
            return await all_fresh(client)
        except (httpx.HTTPError, AssertionError):
            return None

    state = await eventually(is_back, within_s=120, every_s=0.1)
    assert state["leader"] != leader
    assert sum(r["load"]["num_running"] + r["load"]["pages_used"] for r in state["replicas"]) == 0
    assert (await stream(client, chat(PROMPTS[2]))).done
