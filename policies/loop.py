"""The one periodic loop of the control path."""

import asyncio
from collections.abc import Awaitable, Callable

PERIOD_S = 0.2
"""How often loads are published and plans decided."""

Clock = Callable[[], float]
Sleep = Callable[[float], Awaitable[None]]


async def run_every(
    period_s: float, step: Callable[[], Awaitable[object]], stop: asyncio.Event, clock: Clock, sleep: Sleep
) -> None:
    """Run `step` once a period, the first time at once, until `stop` is set.

    A step that takes longer than a period is followed by the next without a pause; missed periods
    are not made up for.
    """
    while not stop.is_set():
        started_s = clock()
        await step()
        await sleep(max(0.0, started_s + period_s - clock()))
