"""No request fails because of Redis, whatever happens to it, or to the controller. docs/faults.md"""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
import redis.asyncio

from cluster.embedded_redis import EmbeddedRedis
from policies.control.controller import Controller
from policies.control.plan_sync import PlanFollower
from policies.control.store import LoadStore
from policies.registry import create_policy
from tests.eventually import eventually
from tests.router.conftest import running
from tests.router.faults import PATH, chat, served
from tests.router.stack import Stack

pytestmark = pytest.mark.timeout(120)


# Redis.


@pytest.fixture
def valkey() -> Iterator[EmbeddedRedis]:
    embedded = EmbeddedRedis.start()
    yield embedded
    embedded.stop()


class SlowProxy:
    """Before a server, every answer `delay_s` late; cut, it refuses and drops."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.delay_s = 0.0
        self._writers: set[asyncio.StreamWriter] = set()
        self.cut = False

    async def __aenter__(self) -> "SlowProxy":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        self.drop()

    def drop(self) -> None:
        for writer in self._writers:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.cut:
            writer.close()
            return
        try:
            back, forth = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError:
            writer.close()
            return
        self._writers |= {writer, forth}
        await asyncio.gather(self._pump(reader, forth, False), self._pump(back, writer, True))

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, late: bool) -> None:
        try:
            while data := await source.read(65536):
                if late:
                    await asyncio.sleep(self.delay_s)
                sink.write(data)
                await sink.drain()
        except OSError:
            pass
        finally:
            sink.close()


@asynccontextmanager
async def controlled(stack: Stack, url: str) -> AsyncIterator[LoadStore]:
    """The stack's replica and a controller on their way through this Redis."""
    store = LoadStore(url)
    service = stack.replicas[0].service
    follower = PlanFollower(
        store,
        create_policy("threshold"),
        service.snapshot,
        lambda plan: service.set_plan(plan.decode, plan.rule),
    )
    controller = Controller(store, create_policy("threshold"))
    stop = asyncio.Event()
    async with running(follower.run(stop)), running(controller.run(stop)):
        yield store
    await store.close()


async def keep_asking(client: httpx.AsyncClient, until: asyncio.Event) -> list[int]:
    statuses = []
    while not until.is_set():
        statuses.append((await client.post(PATH, json=chat())).status_code)
    return statuses


@pytest.mark.parametrize("fault", ["killed", "paused", "slow", "flapping", "full", "wrong password"])
async def test_no_request_fails_because_of_redis(valkey: EmbeddedRedis, fault: str) -> None:
    async with SlowProxy(valkey.port) as proxy:
        url = valkey.url.replace(f":{valkey.port}/", f":{proxy.port}/")
        store = LoadStore(url)
        async with served(store=store) as (stack, client), controlled(stack, url):
            done = asyncio.Event()
            asking = [asyncio.create_task(keep_asking(client, done)) for _ in range(3)]
            await eventually(lambda: stack.door.view.loads(), within_s=20.0, every_s=0.05)
            raw = redis.asyncio.Redis.from_url(valkey.url)
            began_s = time.monotonic()
            match fault:
                case "killed":
                    assert valkey.pid is not None
                    os.kill(valkey.pid, signal.SIGKILL)
                    await asyncio.sleep(1.0)
                case "paused":
                    pid = valkey.pid
                    assert pid is not None
                    os.kill(pid, signal.SIGSTOP)
                    await eventually(lambda: stack.door.view.store_error, within_s=10.0, every_s=0.05)
                    await asyncio.sleep(1.0)
                    os.kill(pid, signal.SIGCONT)
                case "slow":
                    proxy.delay_s = 2.0
                    await eventually(lambda: stack.door.view.store_error, within_s=10.0, every_s=0.05)
                    await asyncio.sleep(1.0)
                    proxy.delay_s = 0.0
                case "flapping":
                    for _ in range(6):
                        proxy.cut = not proxy.cut
                        proxy.drop()
                        await asyncio.sleep(0.25)
                    proxy.cut = False
                case "full":
                    await raw.config_set("maxmemory", "1")
                    await asyncio.sleep(1.5)
                    await raw.config_set("maxmemory", "64mb")
                case "wrong password":
                    password = valkey.url.split(":")[2].split("@")[0]
                    await raw.config_set("requirepass", "another")
                    proxy.drop()
                    await eventually(lambda: stack.door.view.store_error, within_s=10.0, every_s=0.05)
                    await raw.config_set("requirepass", password)
            assert time.monotonic() - began_s < 30.0
            await raw.aclose()

            async def healed() -> bool:
                loads = stack.door.view.loads()
                return stack.door.view.store_error is None and bool(loads) and loads[0].age_s < 1.0

            await eventually(healed, within_s=20.0, every_s=0.05)
            done.set()
            statuses = [status for each in asyncio.as_completed(asking) for status in await each]
            assert len(statuses) > 10
            assert set(statuses) == {200}
        await store.close()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_another_controller_leads_when_the_leader_is_killed_or_paused(
    valkey: EmbeddedRedis, how: signal.Signals
) -> None:
    root = Path(__file__).parents[2]
    command = [
        sys.executable,
        "-m",
        "tests.policies.control.controller_process",
        valkey.url,
        "triad",
        "leader",
    ]
    leader = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)  # noqa: ASYNC220
    try:
        assert leader.stdout is not None
        assert await asyncio.to_thread(leader.stdout.readline) == "running\n"
        store = LoadStore(valkey.url)
        async with served(store=store) as (stack, client), controlled(stack, valkey.url) as control:

            async def leader_name() -> str:
                return (await control.read_view()).leader or ""

            assert (await leader_name()).startswith("leader-")
            os.kill(leader.pid, how)
            took_s = time.monotonic()

            async def taken_over() -> bool:
                name = await leader_name()
                return bool(name) and not name.startswith("leader-")

            await eventually(taken_over, within_s=10.0, every_s=0.02)
            took_s = time.monotonic() - took_s
            assert (await client.post(PATH, json=chat())).status_code == 200
            if how == signal.SIGSTOP:
                os.kill(leader.pid, signal.SIGCONT)
                await asyncio.sleep(0.5)
                assert await taken_over()  # the paused one does not lead again
            print(f"taken over in {took_s:.2f} s")
        await store.close()
    finally:
        leader.kill()
        leader.wait()
