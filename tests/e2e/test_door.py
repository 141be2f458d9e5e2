"""Through the default door of a whole server: half a request is ended, and a client that goes is noticed."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest

from benchmarks.processes import Triad
from cluster.haproxy import TIMEOUT_VARIABLE
from tests.e2e.clients import PATH, chat, state_of, stream, total
from tests.eventually import eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

HEAD_TIMEOUT_S = 1
BODY_TIMEOUT_S = 2
SILENT_S = 4
BOUNDS_S = (HEAD_TIMEOUT_S, HEAD_TIMEOUT_S)
LONG = 900


@pytest.fixture(scope="module")
def door_server() -> Iterator[Triad]:
    env = {TIMEOUT_VARIABLE: str(HEAD_TIMEOUT_S), "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(SILENT_S)}
    with Triad(f"body_timeout_s={BODY_TIMEOUT_S}", "policy=ar", env=env) as server:
        yield server


@pytest.fixture
async def door_client(door_server: Triad) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=door_server.url, timeout=60.0) as client:
        yield client


def head(length: int, *more: str) -> bytes:
    lines = [f"POST {PATH} HTTP/1.1", "Host: a", "Content-Type: application/json", *more]
    return ("\r\n".join([*lines, f"Content-Length: {length}"]) + "\r\n\r\n").encode()


async def ended(server: Triad, sent: bytes, goes_on: bool) -> tuple[float, bytes]:
    """How long a connection lasts on which this was sent, and then a byte now and then; what came back."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    began_s = time.monotonic()
    writer.write(sent)

    async def trickle() -> None:
        while True:
            writer.write(b" ")
            await asyncio.sleep(0.05)

    trickling = asyncio.create_task(trickle()) if goes_on else None
    try:
        async with asyncio.timeout(30):
            answer = await reader.read()
    finally:
        if trickling is not None:
            trickling.cancel()
        writer.close()
    return time.monotonic() - began_s, answer


@pytest.mark.parametrize("goes_on", [False, True])
async def test_half_a_request_gets_a_408_and_a_stream_beside_it_is_untouched(
    door_server: Triad, door_client: httpx.AsyncClient, goes_on: bool
) -> None:
    body = chat("Write a short story about Anna.", max_tokens=LONG)
    alone = await stream(door_client, body)
    beside = asyncio.create_task(stream(door_client, body))
    short, long = head(500) + b'{"model": ', head(1_000_000) + b" " * 100_000
    halves = [b"POST /v1", head(500)[:-4] + b"\r\nX: ", short, long]
    found = await asyncio.gather(*(ended(door_server, half, goes_on) for half in halves * 4))
    for number, (seconds, answer) in enumerate(found):
        least_s, most_s = (BODY_TIMEOUT_S, BODY_TIMEOUT_S + SILENT_S) if number % 4 == 3 else BOUNDS_S
        assert least_s * 0.9 < seconds < most_s + 2, (number, answer)
        assert answer.startswith(b"HTTP/1.1 408 "), (number, answer)
        if number % 4 >= 2:
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"
    told = await beside
    assert told.done
    assert told.text == alone.text


@pytest.mark.parametrize("streams", [False, True])
async def test_a_client_that_goes_is_noticed_though_its_body_came_apart(
    door_server: Triad, door_client: httpx.AsyncClient, streams: bool
) -> None:
    content = json.dumps(chat("Hello", max_tokens=LONG, stream=streams, n=8)).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", door_server.port)
    writer.write(head(len(content), "Expect: 100-continue"))
    await reader.readuntil(b" 100 Continue\r\n\r\n")  # so HAProxy has the head by itself
    writer.write(content)

    async def runs() -> bool:
        return await total(door_client, "num_running") == 8

    await eventually(runs, within_s=10, every_s=0.02)
    writer.close()
    left_s = time.monotonic()

    async def idle() -> bool:
        state = await state_of(door_client)
        return not any(state["router"]["in_flight"].values())

    await eventually(idle, within_s=10, every_s=0.02)
    assert time.monotonic() - left_s < 2


async def test_completions_come_past_serve_and_all_else_by_it(door_client: httpx.AsyncClient) -> None:
    """Told by the request's id, which Serve returns as it came and the app as a plain word."""
    headers = {"x-request-id": "two words"}
    for streams in (False, True):
        body = chat("Hello", max_tokens=2, stream=streams)
        answer = await door_client.post(PATH, json=body, headers=headers)
        assert answer.headers.get_list("x-request-id") == ["two_words"]
    answer = await door_client.get("/v1/models", headers=headers)
    assert answer.headers.get_list("x-request-id") == ["two words"]
