"""The one periodic loop of the control path."""

import asyncio
import logging
import traceback
from collections.abc import Awaitable, Callable

logger = logging.getLogger(__name__)

PERIOD_S = 0.2
"""How often loads are published and plans decided."""

Clock = Callable[[], float]
Sleep = Callable[[float], Awaitable[None]]


class Failures:
    """Logs what fails again and again once a kind: by the exception's type and the line that raised it.

    what: fails, for the log.
    """

    def __init__(self, what: str):
        self._what = what
        self._known: set[tuple[str, str, int]] = set()

    def note(self, error: Exception) -> None:
        frames = traceback.extract_tb(error.__traceback__)
        where = (frames[-1].filename, frames[-1].lineno or 0) if frames else ("", 0)
        kind = (type(error).__name__, *where)
        if kind not in self._known:
            self._known.add(kind)
            logger.error("%s failed; more of this kind is not logged", self._what, exc_info=error)


async def run_every(
    period_s: float,
    step: Callable[[], Awaitable[object]],
    stop: asyncio.Event,
    clock: Clock,
    sleep: Sleep,
    what: str = "a periodic step",
) -> None:
    """Run `step` once a period, the first time at once, until `stop` is set.

    A step that takes longer than a period is followed by the next without a pause; missed periods
    are not made up for. One that fails is logged, once a kind, and the next is run all the same: whatever
    it was to bring stays as it was. what: the step is, for the log.
    """
    failures = Failures(what)
    while not stop.is_set():
        started_s = clock()
        try:
            await step()
        except Exception as error:
            failures.note(error)
        await sleep(max(0.0, started_s + period_s - clock()))
