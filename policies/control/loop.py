"""The one periodic loop of the control path."""

import asyncio
from collections.abc import Awaitable, Callable

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
    what: str = "a periodic step",
) -> None:
    """Runs `step` once a period, the first time at once, until `stop` is set.

    A step that takes longer than a period is followed by the next without a pause; missed periods
    are not made up for. A step that fails is logged, once a kind, and the next is run all the same.
    what: the step's name in the log.
    """
    failures = Failures(what)
    while not stop.is_set():
        started_s = clock()
        try:
            await step()
        except Exception as error:
            failures.note(error)
        await sleep(max(0.0, started_s + period_s - clock()))
