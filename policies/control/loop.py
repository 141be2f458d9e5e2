"""The one periodic loop of the control path."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable

from policies.failures import Failures

PERIOD_S = 0.2
"""The period at which loads are published and plans decided."""

Clock = Callable[[], float]
Sleep = Callable[[float], Awaitable[None]]


async def run_every(
    period_s: float,
    step: Callable[[], Awaitable[object]],
    stop: asyncio.Event,
    clock: Clock,
    sleep: Sleep,
    failures: Failures,
) -> None:
    """Runs `step` once a period, the first time at once, until `stop` is set.

    A step that takes longer than a period is followed by the next without a pause; missed periods
    are not made up for. A step that fails is noted in `failures`, and the next is run all the same.
    """
    while not stop.is_set():
        started_s = clock()
        with failures:
            await step()
        await sleep(max(0.0, started_s + period_s - clock()))


def check_running(loops: Iterable["asyncio.Task[None]"]) -> None:
    """Raises RuntimeError where one of the loops has ended, whatever it ended by."""
    for loop in loops:
        if loop.done():
            error = None if loop.cancelled() else loop.exception()
            raise RuntimeError(f"{loop.get_name()} has ended: {error!r}") from error
