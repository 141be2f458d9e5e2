import uuid
from collections.abc import AsyncIterator, Iterator

import pytest
import redis.asyncio

from cluster.embedded_redis import EmbeddedRedis
from policies.control.store import LoadStore
from tests.stores import patient_store


@pytest.fixture(scope="session")
def server() -> Iterator[EmbeddedRedis]:
    """One server for all the tests that leave it running."""
    embedded = EmbeddedRedis.start()
    yield embedded
    embedded.stop()


@pytest.fixture
def own_server() -> Iterator[EmbeddedRedis]:
    """A server this test may kill."""
    embedded = EmbeddedRedis.start()
    yield embedded
    embedded.stop()


@pytest.fixture
def app() -> str:
    """An app of this test's own, so that tests share a server without seeing each other."""
    return f"test-{uuid.uuid4().hex[:8]}"


@pytest.fixture
async def store(server: EmbeddedRedis, app: str) -> AsyncIterator[LoadStore]:
    store = patient_store(server.url, app)
    yield store
    await store.close()


@pytest.fixture
async def raw(server: EmbeddedRedis) -> AsyncIterator[redis.asyncio.Redis]:
    """The server itself, to see what the store wrote and to write what it would not."""
    client = redis.asyncio.Redis.from_url(server.url, decode_responses=True)
    yield client
    await client.aclose()
