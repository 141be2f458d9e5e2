"""The cluster's load as this router last read it. Nothing on a request's path waits for Redis."""

import asyncio
import logging
import math
import time
from dataclasses import replace

from policies.control.loop import PERIOD_S, Clock, Sleep, run_every
from policies.control.store import LoadStore, StoreUnavailable
from policies.failures import Failures
from policies.replica_load import ClusterLoad, ObservedLoad

logger = logging.getLogger(__name__)


class LoadView:
    """The loads last read: run() refreshes them; loads() answers at once, with ages as of now.

    When the store is lost the last reading ages, past LOST_S says nothing any more, and the
    router's own counts decide. While another reader in this process passes on what it reads (`take`), run()
    asks for nothing.
    """

    def __init__(
        self,
        store: LoadStore,
        period_s: float = PERIOD_S,
        clock: Clock = time.monotonic,
        sleep: Sleep = asyncio.sleep,
    ):
        self._store = store
        self._period_s = period_s
        self._clock = clock
        self._sleep = sleep
        self._read: dict[str, ObservedLoad] = {}
        self._read_at_s = clock()
        self._taken_at_s = -math.inf
        self.store_error: str | None = None
        """The error of the last reading; None if it didn't fail."""

    def loads(self) -> tuple[ObservedLoad, ...]:
        return tuple(self._as_of_now(seen) for seen in self._read.values())

    def seen(self, replica_id: str) -> ObservedLoad | None:
        """One replica's load; None if it has published none."""
        seen = self._read.get(replica_id)
        return None if seen is None else self._as_of_now(seen)

    def take(self, read: ClusterLoad, asked_at_s: float) -> None:
        """Takes over what another reader has found.

        asked_at_s: the time by this view's clock before it asked
        """
        self._taken_at_s = asked_at_s
        self._set(read, asked_at_s)

    async def refresh(self) -> None:
        # Taken before the call, so that the age errs on the old side.
        asked_at_s = self._clock()
        try:
            read = await self._store.read_loads()
        except StoreUnavailable as error:
            if self.store_error is None:
                logger.warning("no loads: %s", error)
            self.store_error = str(error)
        else:
            self._set(read, asked_at_s)

    async def run(self) -> None:
        failures = Failures("reading the loads")
        await run_every(self._period_s, self._step, asyncio.Event(), self._clock, self._sleep, failures)

    async def _step(self) -> None:
        # Half a period more: the other reader keeps the same period, and neither is on time to the ms.
        if self._clock() >= self._taken_at_s + 1.5 * self._period_s:
            await self.refresh()

    def _set(self, read: ClusterLoad, asked_at_s: float) -> None:
        self._read = read.by_id()
        self._read_at_s = asked_at_s
        self.store_error = None

    def _as_of_now(self, seen: ObservedLoad) -> ObservedLoad:
        return replace(seen, age_s=seen.age_s + self._clock() - self._read_at_s)
