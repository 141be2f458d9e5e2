"""A server that becomes a replica is left, and nobody takes it for one that works meanwhile."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from policies.control.store import LoadStore, StoreUnavailable
from router.auth import ApiKey
from router.errors import ApiError
from router.limits import KeyLimiter
from router.metrics import Metrics
from router.operate import read_cluster
from tests.policies.control.test_connection import answers, free_port, use, valkey
from tests.policies.helpers import FakeClock, a_load, eventually
from tests.router.test_limits import a_request, outcome


class Service:
    """A name for one of several servers, as Kubernetes and DNS have it: who connects gets the present one,
    and who is connected keeps what he has."""

    def __init__(self, target_port: int):
        self.target_port = target_port
        self.num_connections = 0
        self._pumps: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[int]:
        """Yields the port of the name."""
        server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()
            for pump in self._pumps:
                pump.cancel()
            await asyncio.gather(*self._pumps, return_exceptions=True)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        there = await asyncio.open_connection("127.0.0.1", self.target_port)
        for source, sink in ((reader, there[1]), (there[0], writer)):
            pump = asyncio.create_task(self._pump(source, sink))
            self._pumps.add(pump)
            pump.add_done_callback(self._pumps.discard)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
        finally:
            sink.close()


@pytest.fixture
async def pair(tmp_path):
    """Ports of a server and of its replica, and clients of both."""
    ports = free_port(), free_port()
    plain = ["--save", "", "--repl-diskless-sync-delay", "0"]
    with (
        valkey(tmp_path / "first", "--port", str(ports[0]), *plain),
        valkey(tmp_path / "second", "--port", str(ports[1]), *plain),
    ):
        clients = [await answers(port) for port in ports]
        await clients[1].replicaof("127.0.0.1", ports[0])

        async def is_synced() -> bool:
            return (await clients[1].info("replication"))["master_link_status"] == "up"

        await eventually(is_synced, bool, timeout_s=20.0)
        yield ports, clients
        for client in clients:
            await client.aclose()


async def demote_first(ports, clients):
    await clients[1].replicaof("NO", "ONE")
    await clients[0].replicaof("127.0.0.1", ports[1])


async def test_after_a_failover_behind_one_name_the_store_works_on_the_new_server(pair, app):
    ports, clients = pair
    service = Service(ports[0])
    async with service.serve() as port:
        store = LoadStore(f"redis://127.0.0.1:{port}/0", app)
        # Several connections at once, so that the pool has idle ones to the old server.
        await asyncio.gather(*(store.publish_and_read(a_load(1, f"r{number}")) for number in range(8)))
        assert service.num_connections > 1
        await demote_first(ports, clients)
        service.target_port = ports[1]
        with pytest.raises(StoreUnavailable, match="read only"):
            await store.publish_and_read(a_load(1))
        await use(store)
        await asyncio.gather(*(store.publish_and_read(a_load(1, f"r{number}")) for number in range(8)))
        await store.close()


async def test_a_server_that_has_become_a_replica_is_not_up_for_those_who_only_read(pair, app):
    """And it is again as soon as the name is that of the new one."""
    ports, clients = pair
    service = Service(ports[0])
    metrics = Metrics("model", "one")
    async with service.serve() as port:
        store = LoadStore(f"redis://127.0.0.1:{port}/0", app)
        await store.publish_and_read(a_load(1))
        await read_cluster(metrics, store)
        assert metrics.seen.store_available
        await demote_first(ports, clients)
        for _ in range(3):
            await read_cluster(metrics, store)
            assert not metrics.seen.store_available
        with pytest.raises(StoreUnavailable):
            await store.read_loads()
        service.target_port = ports[1]
        await read_cluster(metrics, store)
        assert metrics.seen.store_available
        await store.close()
    metrics.close()


async def test_limits_are_counted_on_the_new_server(pair, app):
    ports, clients = pair
    service = Service(ports[0])
    key = ApiKey("team", b"", requests_per_minute=2)
    async with service.serve() as port:
        clock = FakeClock()
        limiter = KeyLimiter(LoadStore(f"redis://127.0.0.1:{port}/0", app), "closed", clock=clock)
        await limiter.charge(key, a_request())
        await demote_first(ports, clients)
        service.target_port = ports[1]
        with pytest.raises(ApiError, match="can't count"):
            await limiter.charge(key, a_request())
        clock.now_s += 2.0
        await limiter.charge(key, a_request())
        # The first charge may not have reached the new server; with the second, two more are too many.
        outcomes = [await outcome(limiter, key, a_request()) for _ in range(2)]
        assert "used up" in str(outcomes[1])
        await limiter.close()
