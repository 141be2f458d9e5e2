"""A server's life as `make serve` starts it: each request one trace, a soak, and an end by SIGTERM."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from benchmarks.processes import ServerProcess, free_port, short_folder
from benchmarks.soak import arguments, new_keys, soak
from benchmarks.soak_figures import KV_CACHE_MIB, report
from router.auth import ENVIRONMENT
from tests.e2e.clients import PATH, chat, complete, stream
from tests.eventually import eventually
from tests.telemetry.collector import Collector, Span, http_collector

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with http_collector() as collector:
        yield collector


ENTRIES, KEYS = new_keys()
BEARER = {"authorization": f"Bearer {KEYS['ops']}"}


@pytest.fixture(scope="module")
def server(collector: Collector) -> Iterator[ServerProcess]:
    port = free_port()
    folder = short_folder()
    env = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PORT": str(port),
        "REPLICAS": "2",
        "RAY_TMPDIR": str(folder),
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint,
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        "OTEL_BSP_SCHEDULE_DELAY": "200",
        ENVIRONMENT: ENTRIES,
    }
    # The soak allows for that many pages, which become resident as the prefix cache fills.
    command = ["bash", "cluster/serve.sh", f"kv_cache_mb={KV_CACHE_MIB}"]
    with ServerProcess(command, port, "/readyz", env, folder) as server:
        server.wait_until_ready()
        yield server


@pytest.fixture
async def client(server: ServerProcess) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=server.url, headers=BEARER, timeout=120.0) as client:
        yield client


def assert_connected(spans: list[Span], parent_id: str) -> None:
    """Every span but the ingress's hangs below another one of the trace."""
    ids = {span.span_id for span in spans}
    assert [span.name for span in spans if span.parent_id not in ids] == [f"POST {PATH}"]
    (root,) = [span for span in spans if span.parent_id == parent_id]
    assert root.component == "ingress"
    (replica,) = [span for span in spans if span.parent_id == root.span_id]
    assert (replica.name, replica.component) == ("triad.replica", "replica")
    inside = [span.name for span in spans if span.parent_id == replica.span_id]
    assert {"triad.queue", "triad.prefill", "triad.decode"} == set(inside)
    assert len(spans) == 2 + len(inside)


def is_there(session: int) -> bool:
    """True if the session has any process left."""
    try:
        os.killpg(session, 0)
    except ProcessLookupError:
        return False
    return True


async def test_ctrl_c_while_it_starts_ends_it_calmly() -> None:
    port, folder = free_port(), short_folder()
    env = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PORT": str(port),
        "RAY_TMPDIR": str(folder),
    }
    # A shell can not trap what is ignored where it starts, as in a job in the background.
    command = ["env", "--default-signal=INT", "bash", "cluster/serve.sh"]
    with ServerProcess(command, port, "/readyz", env, folder) as server:
        server.wait_for(lambda: server.pids("cluster.serve ") and server.pids("cluster.welcome attend"))
        session = server.process.pid
        os.killpg(session, signal.SIGINT)
        assert server.process.wait(60) == 130
        said = server.log.read_text()
        await eventually(lambda: not is_there(session))  # what it told to end it does not wait for
    assert said.endswith("\nstopping at once\n")
    assert len(said.splitlines()) <= 10
    assert "Traceback" not in said


def test_a_server_whose_replica_cannot_start_ends_and_says_why(tmp_path: Path) -> None:
    port, folder = free_port(), short_folder()
    env = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PORT": str(port),
        "MODEL": str(tmp_path),
        "RAY_TMPDIR": str(folder),
    }
    with ServerProcess(["bash", "cluster/serve.sh"], port, "/readyz", env, folder) as server:
        assert server.process.wait(300) == 1
        said = server.log.read_text()
    # Ray may have a last word on its own end behind it.
    assert "is missing: not a checkpoint folder" in "\n".join(said.splitlines()[-5:])


async def test_each_request_is_one_connected_trace(client: httpx.AsyncClient, collector: Collector) -> None:
    bodies = [
        chat("Hello", max_tokens=20, decoding={"mode": mode})
        for mode in ("ar", "diffusion", "self_speculation", "auto")
    ]
    parents = {}

    async def ask(number: int, body: dict) -> None:
        trace_id, span_id = f"{number + 1:032x}", f"{number + 100:016x}"
        headers = BEARER | {"traceparent": f"00-{trace_id}-{span_id}-01"}
        async with httpx.AsyncClient(base_url=client.base_url, headers=headers, timeout=60.0) as traced:
            await (stream(traced, body) if number % 2 else complete(traced, body))
        parents[trace_id] = span_id

    await asyncio.gather(*(ask(number, body) for number, body in enumerate(bodies + bodies)))

    def all_arrived() -> bool:
        names = [{span.name for span in collector.trace(trace_id)} for trace_id in parents]
        return all({f"POST {PATH}", "triad.replica"} <= seen for seen in names)

    await eventually(all_arrived, within_s=20, every_s=0.1)
    for trace_id, parent_id in parents.items():
        assert_connected(collector.trace(trace_id), parent_id)


async def test_after_load_and_faults_all_is_as_before(server: ServerProcess) -> None:
    """The soak, cut to some seconds, with each of its faults."""
    found = await soak(server, KEYS, arguments(["--minutes", "0.3"]))
    report(found)
    assert found["fine"]
    assert found["requests"]["complete"] > 50
    kinds = {"burst", "policy switched", "Redis killed", "Redis paused", "replica killed"}
    assert set(found["faults"]) == kinds


async def test_sigterm_finishes_what_has_begun_and_refuses_the_rest(
    client: httpx.AsyncClient, server: ServerProcess
) -> None:
    """The last of this module: it ends the server."""
    body = chat("Write a short story about Anna.", max_tokens=900, decoding={"mode": "ar"})
    alone = await stream(client, body)
    begun = [asyncio.create_task(stream(client, body)) for _ in range(4)]
    whole = asyncio.create_task(complete(client, body))

    async def all_run() -> bool:
        state = (await client.get("/v1/triad/state")).json()
        return sum(r["load"]["num_running"] for r in state["replicas"]) == 5

    await eventually(all_run, within_s=20, every_s=0.02)
    server.process.send_signal(signal.SIGTERM)

    async def refused() -> httpx.Response | None:
        response = await client.post(PATH, json=chat("Hello", max_tokens=1))
        return None if response.status_code == 200 else response

    refusal = await eventually(refused, within_s=20, every_s=0.02)
    assert not any(task.done() for task in begun), "they ended before it drained: nothing is shown"
    assert refusal.status_code == 503
    assert int(refusal.headers["retry-after"]) >= 1
    assert (await client.get("/readyz")).status_code == 503
    for streamed in await asyncio.gather(*begun):
        assert streamed.done
        assert streamed.error is None
        assert streamed.text == alone.text
    answer = await whole
    assert answer["usage"]["completion_tokens"] == 900
    assert await asyncio.to_thread(server.process.wait, 60) == 0
    assert "stopping, once what has begun is finished" in server.log.read_text()
