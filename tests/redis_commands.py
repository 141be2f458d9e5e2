"""What clients send to a server, by its own MONITOR."""

import asyncio
import time
import uuid
from collections.abc import Awaitable

import redis.asyncio

_GREETINGS = frozenset({"HELLO", "AUTH", "SELECT", "CLIENT"})


async def commands_while(url: str, doing: Awaitable[object]) -> tuple[list[str], float]:
    """Each command that clients sent meanwhile, none of scripts and greetings; and for how many seconds."""
    client = redis.asyncio.Redis.from_url(url, decode_responses=True)
    sent: list[str] = []
    end = uuid.uuid4().hex
    async with client.monitor() as monitor:

        async def listen() -> None:
            while True:
                seen = await monitor.next_command()
                if end in seen["command"]:
                    return
                if seen["client_type"] != "lua" and seen["command"].split()[0].upper() not in _GREETINGS:
                    sent.append(seen["command"])

        listening = asyncio.create_task(listen())
        began_s = time.monotonic()
        await doing
        elapsed_s = time.monotonic() - began_s
        await client.echo(end)
        await asyncio.wait_for(listening, 10.0)
    await client.aclose()
    return sent, elapsed_s
