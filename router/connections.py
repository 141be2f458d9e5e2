"""Keeps a connection to every replica that runs; looks for them every second and when a channel breaks."""

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence

from policies.control.loop import Clock
from replicas.messages import ModelInfo
from router.ejection import FailureWatch
from router.placement import OwnTraffic
from router.replica_connection import ConnectionTimes, Directory, ReplicaConnection

logger = logging.getLogger(__name__)

DISCOVERY_PERIOD_S = 1.0


class ReplicaConnections:
    """The connections to all replicas, by replica id, on one event loop; run() keeps them.

    directory: the replicas that run
    traffic: told of each request that goes out on a connection
    on_gone: called with the id of a replica that has left
    """

    def __init__(
        self,
        directory: Directory,
        traffic: OwnTraffic,
        on_gone: Callable[[str], None],
        *,
        times: ConnectionTimes,
        discovery_period_s: float,
        clock: Clock,
    ):
        self._directory = directory
        self._traffic = traffic
        self._on_gone = on_gone
        self._times = times
        self._discovery_period_s = discovery_period_s
        self._clock = clock
        self._watch = FailureWatch()
        self._connections: dict[str, ReplicaConnection] = {}
        self._runs: dict[str, asyncio.Task[None]] = {}
        self._look_again = asyncio.Event()
        self._model: ModelInfo | None = None

    def __getitem__(self, replica_id: str) -> ReplicaConnection:
        return self._connections[replica_id]

    @property
    def model(self) -> ModelInfo | None:
        """The model that the replicas serve; None until a replica has been seen."""
        return self._model

    @property
    def any_open(self) -> bool:
        """True while some replica can take a request."""
        return any(connection.is_open for connection in self._connections.values())

    def in_flight(self) -> dict[str, int]:
        """This router's own requests, by replica, however many choices they have."""
        found = sorted(self._connections.items())
        return {replica_id: connection.num_in_flight for replica_id, connection in found}

    def usable(self, avoid: Collection[str] = ()) -> Sequence[str]:
        """The reachable replicas but those to avoid, and without those that fail all they are sent."""
        reachable = [
            replica_id
            for replica_id, connection in self._connections.items()
            if connection.is_open and replica_id not in avoid
        ]
        return self._watch.trusted(reachable, self._clock())

    async def run(self) -> None:
        """Keeps a connection to each replica that runs, until cancelled; then every request still here
        fails."""
        try:
            while True:
                self._look_again.clear()
                await self._discover()
                try:
                    async with asyncio.timeout(self._discovery_period_s):
                        await self._look_again.wait()
                except TimeoutError:
                    continue
        finally:
            runs = list(self._runs.values())
            for run in runs:
                run.cancel()
            await asyncio.gather(*runs, return_exceptions=True)

    async def _discover(self) -> None:
        try:
            roster = await self._directory.roster()
        except Exception as error:
            logger.debug("no roster: %r", error)
            return
        found = {client.info.replica_id: client for client in roster.clients}
        for replica_id, connection in self._connections.items():
            if replica_id in found or roster.complete:
                connection.leaving = replica_id not in found
        for replica_id, client in found.items():
            self._model = client.info
            if replica_id not in self._connections:
                connection = ReplicaConnection(
                    client, self._traffic, self._watch, self._times, self._look_again.set, self._clock
                )
                self._connections[replica_id] = connection
                run = self._runs[replica_id] = asyncio.create_task(connection.run())
                run.add_done_callback(lambda _, gone=replica_id: self._drop(gone))  # type: ignore[misc]

    def _drop(self, replica_id: str) -> None:
        del self._connections[replica_id]
        del self._runs[replica_id]
        self._traffic.forget(replica_id)
        self._watch.forget(replica_id)
        self._on_gone(replica_id)
