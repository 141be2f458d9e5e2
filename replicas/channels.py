"""Token channels: one long-lived stream to each ingress carries the events of all its requests.

A stream for each request would cost about a millisecond an item and more than the model itself at
64 requests; a channel has one item a step, whatever the number of requests.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping

from replicas.messages import Event

KEEP_ALIVE_S = 1.0


class ChannelHub:
    """The open token channels of a replica; lives on one event loop.

    on_close: called with the id of a channel that has closed, whose requests are to be cancelled
    """

    def __init__(self, on_close: Callable[[str], None]):
        self._on_close = on_close
        self._open: dict[str, asyncio.Queue[tuple[Event, ...] | None]] = {}
        self._is_closed = False

    def is_open(self, channel_id: str) -> bool:
        """True if the channel is open; from any thread. One that closes later is told of by on_close after
        this."""
        return channel_id in self._open and not self._is_closed

    def publish(self, events: Mapping[str, list[Event]]) -> None:
        """Sends events to their channels; those of a closed channel have nobody to go to."""
        for channel_id, batch in events.items():
            queue = self._open.get(channel_id)
            if queue is not None:
                queue.put_nowait(tuple(batch))

    def close(self) -> None:
        """Ends every channel's stream, after what was published; one that is opened from now on ends at
        once, without an item."""
        self._is_closed = True
        for queue in self._open.values():
            queue.put_nowait(None)

    async def stream(self, channel_id: str) -> AsyncIterator[tuple[Event, ...]]:
        """Events as they come, those that wait joined into one item; an empty item at once and when idle.

        Opening a channel again ends the stream that had it.
        """
        if self._is_closed:
            return
        former = self._open.get(channel_id)
        if former is not None:
            former.put_nowait(None)
            self._on_close(channel_id)
        queue: asyncio.Queue[tuple[Event, ...] | None] = asyncio.Queue()
        self._open[channel_id] = queue
        try:
            yield ()
            while True:
                try:
                    async with asyncio.timeout(KEEP_ALIVE_S):
                        batch = await queue.get()
                except TimeoutError:
                    yield ()
                    continue
                events: list[Event] = []
                while batch is not None:
                    events += batch
                    if queue.empty():
                        break
                    batch = queue.get_nowait()
                if events:
                    yield tuple(events)
                if batch is None:
                    return
        finally:
            if self._open.get(channel_id) is queue:
                del self._open[channel_id]
                self._on_close(channel_id)
