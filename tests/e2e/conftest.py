import json
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest

from benchmarks.processes import Triad

LEVELS = [
    {"max_in_flight": 1, "mode": "diffusion", "block_length": 16},
    {"max_in_flight": 3, "mode": "self_speculation", "block_length": 8},
]
"""For each replica; above them it is ar."""


@pytest.fixture(scope="session")
def server() -> Iterator[Triad]:
    """Two replicas and an embedded Valkey, for all tests: it leaves each of them as it was."""
    params = json.dumps({"levels": LEVELS, "stabilise": {"dwell_s": 0.5}})
    with Triad("num_replicas=2", "policy=threshold", f"policy_params={params}", "max_waiting=64") as server:
        yield server


@pytest.fixture
async def client(server: Triad) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=64)
    async with httpx.AsyncClient(base_url=server.url, timeout=120.0, limits=limits) as client:
        yield client
