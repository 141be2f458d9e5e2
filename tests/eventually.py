"""Waiting for what happens elsewhere, up to a deadline."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


async def eventually(
    probe: Callable[[], T | Awaitable[T]], within_s: float = 5.0, every_s: float = 0.0, what: str = ""
) -> T:
    """The first true answer of `probe`; AssertionError with the last one when none comes in time."""
    deadline_s = time.monotonic() + within_s
    while True:
        answer = probe()
        if inspect.isawaitable(answer):
            answer = await answer
        if answer:
            return answer
        assert time.monotonic() < deadline_s, f"{what or probe} not within {within_s} s: {answer!r}"
        await asyncio.sleep(every_s)
