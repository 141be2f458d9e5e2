"""A channel of a service, read as a stream."""

import asyncio
from collections.abc import AsyncGenerator, Sequence

from replicas.messages import Event
from replicas.service import ReplicaService


class QueuedChannel:
    """A replicas.channels.Channel into a queue, which ends with None."""

    def __init__(self) -> None:
        self.items: asyncio.Queue[tuple[Event, ...] | None] = asyncio.Queue()
        self.has_ended = False
        self._loop = asyncio.get_running_loop()

    def send(self, events: Sequence[Event]) -> None:
        self._loop.call_soon_threadsafe(self.items.put_nowait, tuple(events))

    def end(self) -> None:
        self.has_ended = True
        self._loop.call_soon(self.items.put_nowait, None)  # behind what was sent


async def channel_of(service: ReplicaService, channel_id: str) -> AsyncGenerator[tuple[Event, ...], None]:
    """The events as they come; an empty item once the channel is open. Closing it leaves the channel."""
    channel = QueuedChannel()
    service.open_channel(channel_id, channel)
    if channel.has_ended:
        return
    try:
        yield ()
        while (item := await channel.items.get()) is not None:
            yield item
    finally:
        service.leave_channel(channel_id, channel)
