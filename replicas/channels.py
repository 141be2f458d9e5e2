"""Token channels: one long-lived stream to each ingress carries the events of all its requests.

A stream for each request would cost about a millisecond an item and more than the model itself at
64 requests; a channel has one item a step, whatever the number of requests.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from replicas.messages import Event


class Channel(Protocol):
    """The way of events to one ingress."""

    def send(self, events: Sequence[Event]) -> None:
        """Sends events after those before. Called on the engine's thread, so it must not block; it raises
        nothing."""
        ...

    def end(self) -> None:
        """Says, on the event loop, that nothing comes after what was sent."""
        ...


class ChannelHub:
    """The open token channels of a replica; lives on one event loop but for what says otherwise.

    on_close: called with the id of a channel that has closed, whose requests are to be cancelled
    """

    def __init__(self, on_close: Callable[[str], None]):
        self._on_close = on_close
        self._open: dict[str, Channel] = {}
        self._is_closed = False

    def is_open(self, channel_id: str) -> bool:
        """True if the channel is open; from any thread. One that closes later is told of by on_close after
        this."""
        return channel_id in self._open and not self._is_closed

    def open(self, channel_id: str, channel: Channel) -> None:
        """Opens a channel; one that has this id ends. In a hub that is closed it ends at once."""
        if self._is_closed:
            channel.end()
            return
        former = self._open.get(channel_id)
        if former is not None:
            former.end()
            self._on_close(channel_id)
        self._open[channel_id] = channel

    def left(self, channel_id: str, channel: Channel) -> None:
        """Says that nobody is at the other end any more."""
        if self._open.get(channel_id) is channel:
            del self._open[channel_id]
            self._on_close(channel_id)

    def publish(self, events: Mapping[str, Sequence[Event]]) -> None:
        """Sends events to their channels; those of a closed channel have nobody to go to. On the engine's
        thread."""
        for channel_id, batch in events.items():
            channel = self._open.get(channel_id)
            if channel is not None:
                channel.send(batch)

    def close(self) -> None:
        """Ends every channel, after what was published, and those that are opened from now on."""
        self._is_closed = True
        for channel in tuple(self._open.values()):
            channel.end()
