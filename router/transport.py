"""How the router reaches replicas: an interface, so that everything above it runs without Ray."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol

from replicas.messages import Accepted, Event, GenerateRequest, ModelInfo, Rejected


class ReplicaClient(Protocol):
    """One replica. Any call may raise whatever the transport raises when the replica is gone."""

    @property
    def info(self) -> ModelInfo: ...

    async def submit(self, request: GenerateRequest) -> Accepted | Rejected: ...

    async def cancel(self, request_ids: tuple[str, ...]) -> None: ...

    def channel(self, channel_id: str) -> AsyncGenerator[tuple[Event, ...], None]:
        """The events of all requests submitted with this channel id; an empty item when it opens and
        about every second. Closing it ends those requests at the replica."""
        ...


@dataclass(frozen=True, slots=True)
class Roster:
    """The replicas running now.

    complete: False if some did not answer, so that one missing here may be alive.
    """

    clients: Sequence[ReplicaClient]
    complete: bool = True


class Directory(Protocol):
    async def roster(self) -> Roster:
        """May raise whatever the transport raises; then nothing is known."""
        ...
