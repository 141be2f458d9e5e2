"""What the tests of faults share: the stack behind a real server, clients, and a gated model."""

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx

from replicas.engine.batch import ScheduledBatch
from router.api import create_app
from tests.replicas.engine.scripted import ScriptedRunner
from tests.router.conftest import over_http
from tests.router.fakes import MODEL
from tests.router.stack import Stack, a_stack

PATH = "/v1/chat/completions"


def chat(content: str = "hello", **more: Any) -> dict[str, Any]:
    message = {"role": "user", "content": content}
    body = {"model": MODEL, "messages": [message], "max_tokens": 30, "ignore_eos": True, "temperature": 0}
    return body | more


class Gated(ScriptedRunner):
    """Each forward waits for a permit."""

    def __init__(self, **spec: int) -> None:
        super().__init__(**spec)
        self._permits = threading.Semaphore(0)
        self.num_begun = self.num_allowed = 0

    @property
    def is_waiting(self) -> bool:
        """True while a forward waits for a permit."""
        return self.num_begun > self.num_allowed

    def allow(self, num_forwards: int = 100_000) -> None:
        self.num_allowed += num_forwards
        self._permits.release(num_forwards)

    def run(self, batch: ScheduledBatch):
        self.num_begun += 1
        assert self._permits.acquire(timeout=60)
        return super().run(batch)


@asynccontextmanager
async def served(
    runners: list[ScriptedRunner] | None = None, **more: Any
) -> AsyncIterator[tuple[Stack, httpx.AsyncClient]]:
    """A stack behind a real HTTP server, and a client of it."""
    async with (
        a_stack(runners or [ScriptedRunner()], **more) as stack,
        over_http(create_app(stack.door)) as url,
    ):
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=60.0, limits=limits) as client:
            yield stack, client
            await stack.settled()
            for replica in stack.replicas:
                replica.engine.check_integrity()
                assert replica.service.snapshot().pages_used == 0


async def streamed(
    client: httpx.AsyncClient, body: dict[str, Any], lines: list[str] | None = None
) -> tuple[int, list[str]]:
    lines = [] if lines is None else lines
    async with client.stream("POST", PATH, json=body | {"stream": True}) as response:
        async for line in response.aiter_lines():
            if line:
                lines.append(line.removeprefix("data: "))
    return response.status_code, lines
