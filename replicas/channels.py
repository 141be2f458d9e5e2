"""Token channels: one long-lived stream to each ingress carries the events of all its requests.

A stream for each request would cost about a millisecond an item and more than the model itself at
64 requests; a channel has one item a step, whatever the number of requests.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping

from replicas.mailbox import Mailbox
from replicas.messages import Event

KEEP_ALIVE_S = 1.0
"""The time after which there is an item again, be it empty."""


class ChannelHub:
    """The open token channels of a replica; lives on one event loop.

    on_close: called with the id of a channel that has closed, whose requests are to be cancelled
    """

    def __init__(self, on_close: Callable[[str], None]):
        self._on_close = on_close
        self._open: dict[str, Mailbox[Event]] = {}
        self._is_closed = False

    def is_open(self, channel_id: str) -> bool:
        """True if the channel is open; from any thread. One that closes later is told of by on_close after
        this."""
        return channel_id in self._open and not self._is_closed

    def publish(self, events: Mapping[str, list[Event]]) -> None:
        """Sends events to their channels; those of a closed channel have nobody to go to."""
        for channel_id, batch in events.items():
            mailbox = self._open.get(channel_id)
            if mailbox is not None:
                mailbox.put(batch)

    def close(self) -> None:
        """Ends every channel's stream, after what was published; one that is opened from now on ends at
        once, without an item."""
        self._is_closed = True
        for mailbox in self._open.values():
            mailbox.end()

    async def stream(self, channel_id: str) -> AsyncIterator[tuple[Event, ...]]:
        """Events as they come, those that wait joined into one item; an empty item at once and every second.

        Opening a channel again ends the stream that had it.
        """
        if self._is_closed:
            return
        former = self._open.get(channel_id)
        if former is not None:
            former.end()
            self._on_close(channel_id)
        mailbox: Mailbox[Event] = Mailbox()
        self._open[channel_id] = mailbox
        ticking = asyncio.create_task(_tick(mailbox))
        try:
            yield ()
            while (events := await mailbox.take()) is not None:
                yield tuple(events)
        finally:
            ticking.cancel()
            if self._open.get(channel_id) is mailbox:
                del self._open[channel_id]
                self._on_close(channel_id)


async def _tick(mailbox: Mailbox[Event]) -> None:
    while True:
        await asyncio.sleep(KEEP_ALIVE_S)
        mailbox.put(())
