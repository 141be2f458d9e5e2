import json
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest

from tests.e2e.host import Host

LEVELS = [
    {"max_in_flight": 1, "mode": "diffusion", "block_length": 16},
    {"max_in_flight": 3, "mode": "self_speculation", "block_length": 8},
]
"""For each replica; above them it is ar."""


TWO_REPLICAS = (
    "num_replicas=2",
    "policy=threshold",
    f"policy_params={json.dumps({'levels': LEVELS, 'stabilise': {'dwell_s': 0.5}})}",
    "max_waiting=64",
    "calibration_s=0.2",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Servers come last, and what needs its own before the others share the host, so that one runs at a
    time."""
    items.sort(key=lambda item: (item.get_closest_marker("e2e") is not None, "host" in item.fixturenames))


@pytest.fixture(scope="session")
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


@pytest.fixture
def server(host: Host) -> Host:
    """Two replicas and an embedded Valkey: each test leaves them as they were."""
    return host.serve(*TWO_REPLICAS)


@pytest.fixture
async def client(server: Host) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=64)
    async with httpx.AsyncClient(base_url=server.url, timeout=120.0, limits=limits) as client:
        yield client
