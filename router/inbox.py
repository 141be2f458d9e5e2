"""Where a request's events wait for the task that answers it."""

import asyncio

from replicas.messages import Delta, Event


class Inbox:
    """One request's events, in order, ending with exactly one Finished or Failed; one task reads them.

    The reader is woken once for all that is due, not for each event: waking a task costs more than an event.
    """

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._reader: asyncio.Future[None] | None = None
        self._due_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """The number of events that have not been taken."""
        return len(self._events)

    def put(self, event: Event) -> None:
        self._events.append(event)
        reader = self._reader
        if reader is None:
            return
        if not isinstance(event, Delta):
            self._wake()
        elif self._timer is None:
            loop = reader.get_loop()
            if loop.time() >= self._due_s:
                self._wake()
            elif self._due_s < float("inf"):
                self._timer = loop.call_at(self._due_s, self._wake)

    async def first(self) -> Event:
        """Waits for an event, and returns the first of those that are there without taking it."""
        if not self._events:
            await self._wait(0.0)
        return self._events[0]

    async def take(self, due_s: float = 0.0) -> list[Event]:
        """Waits for an event and until due_s, a time of the loop's clock, or the request's end; takes all."""
        events = self._events
        if not events or (isinstance(events[-1], Delta) and _time_s() < due_s):
            await self._wait(due_s)
        return self.take_now()

    def take_now(self) -> list[Event]:
        """Takes what is there."""
        events, self._events = self._events, []
        return events

    async def _wait(self, due_s: float) -> None:
        loop = asyncio.get_running_loop()
        self._reader, self._due_s = loop.create_future(), due_s
        if self._events and due_s < float("inf"):
            self._timer = loop.call_at(due_s, self._wake)
        try:
            await self._reader
        finally:
            self._reader = None
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


def _time_s() -> float:
    return asyncio.get_running_loop().time()
