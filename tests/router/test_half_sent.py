"""A body that does not come to an end, at an ingress itself: ended with a 408, and nobody else is kept."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from contextlib import suppress

import httpx
import pytest

from router.api import create_app
from router.app_state import AppState
from router.config import IngressConfig
from tests.router.conftest import over_http
from tests.router.fakes import MODEL, ScriptedReplica

MakeDoor = Callable[..., Awaitable[AppState]]
TIMEOUT_S = 0.3
BODY = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "x"}]}).encode()
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"


async def trickle(writer: asyncio.StreamWriter, chunked: bool) -> None:
    """A byte now and then, without end."""
    while True:
        writer.write(b"1\r\n \r\n" if chunked else b" ")
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("goes_on", [False, True])
async def test_a_body_that_is_never_whole_is_a_408(make_door: MakeDoor, chunked: bool, goes_on: bool) -> None:
    door = await make_door(ScriptedReplica("a"), config=IngressConfig(body_timeout_s=TIMEOUT_S))
    length = b"Transfer-Encoding: chunked\r\n\r\n" if chunked else b"Content-Length: 1000000\r\n\r\n"
    async with over_http(create_app(door)) as url, httpx.AsyncClient(base_url=url) as client:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(HEAD + length)
        rest = asyncio.create_task(trickle(writer, chunked)) if goes_on else None
        async with asyncio.timeout(10):
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head)
            assert length is not None
            body = await reader.readexactly(int(length[1]))
            with suppress(ConnectionError):
                assert await reader.read() == b""  # the connection's end
        if rest is not None:
            rest.cancel()
        writer.close()
        assert head.startswith(b"HTTP/1.1 408 ")
        assert json.loads(body)["error"]["code"] == "request_timeout"
        assert f"not whole after {TIMEOUT_S:g} s" in json.loads(body)["error"]["message"]
        assert (await client.get("/v1/models")).status_code == 200


async def test_a_whole_body_sets_no_bound_to_its_answer(make_door: MakeDoor) -> None:
    replica = ScriptedReplica("a")
    door = await make_door(replica, config=IngressConfig(body_timeout_s=0.05))
    async with over_http(create_app(door)) as url, httpx.AsyncClient(base_url=url) as client:
        asking = asyncio.create_task(
            client.post(
                "/v1/chat/completions",
                content=BODY,
                headers={"content-type": "application/json"},
                timeout=0.5,
            )
        )
        with pytest.raises(httpx.ReadTimeout):
            await asking
