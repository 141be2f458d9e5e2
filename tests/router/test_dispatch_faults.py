"""Whatever happens to replicas, channels and clients, every request ends exactly once."""

import asyncio
import random

import pytest

from replicas.errors import ErrorCode, TriadError
from router.dispatch import Dispatcher
from router.generation import Generation
from tests.eventually import eventually
from tests.router.conftest import running
from tests.router.fakes import TEXT, WORDS, FakeDirectory, ScriptedReplica
from tests.router.test_dispatch import a_request, text_of, whole


async def client(dispatcher: Dispatcher, name: str, rng: random.Random) -> str:
    """Streams or collects one answer, perhaps leaving early. Returns how it ended."""
    patience = rng.choice([None, None, rng.randrange(len(WORDS))])
    text = ""
    try:
        async with Generation(dispatcher, a_request(name)) as generation:
            if rng.random() < 0.5:
                text = text_of(await generation.whole())
            else:
                async for deltas in generation.deltas():
                    text += text_of(deltas)
                    assert TEXT.startswith(text)
                    if patience is not None and len(text) >= patience:
                        return "left"
            assert generation.finished is not None
    except TriadError as error:
        return error.code.value
    assert text == TEXT
    return "finished"


@pytest.mark.parametrize("seed", range(40))
async def test_every_request_ends_once_under_random_faults(start, seed):
    """Random steps, losses, refusals, disconnects and rosters: nothing hangs, doubles or leaks."""
    rng = random.Random(seed)
    replicas = [ScriptedReplica(name) for name in "abc"]
    directory = FakeDirectory(list(replicas))
    dispatcher = await start(*replicas, directory=directory, max_waiting=4)
    clients: list[asyncio.Task[str]] = []

    def act() -> None:
        replica = rng.choice(replicas)
        match rng.choices(
            ["step", "submit", "break", "down", "up", "refuse", "roster", "disconnect"],
            [90, 8, 1, 1, 6, 1, 2, 2],
        )[0]:
            case "step" if replica.live:
                replica.step(rng.choice(list(replica.live)))
            case "submit":
                name = str(len(clients))
                clients.append(
                    asyncio.create_task(client(dispatcher, name, random.Random(seed + len(clients))))
                )
            case "break":
                replica.break_channels()
            case "down":
                replica.is_up = False
                replica.break_channels()
            case "up":
                replica.is_up = True
                replica.refusal = None
            case "refuse":
                replica.refusal = (rng.choice([ErrorCode.QUEUE_FULL, ErrorCode.UNAVAILABLE]), "no")
            case "roster":
                directory.replicas = [r for r in replicas if rng.random() < 0.8]
                directory.complete = rng.random() < 0.7
            case "disconnect" if clients:
                rng.choice(clients).cancel()

    for _ in range(600):
        act()
        for _ in range(rng.randrange(4)):
            await asyncio.sleep(0)
    for replica in replicas:
        replica.is_up, replica.refusal = True, None
    directory.replicas, directory.complete = list(replicas), True
    async with running(replicas[0].run()), running(replicas[1].run()), running(replicas[2].run()):
        async with asyncio.timeout(10):
            outcomes = await asyncio.gather(*clients, return_exceptions=True)
        await eventually(lambda: dispatcher.ready)
        assert await whole(dispatcher, a_request("the last")) == TEXT
        await eventually(lambda: not any(replica.live for replica in replicas))
    refusals = {ErrorCode.UNAVAILABLE.value, ErrorCode.QUEUE_FULL.value, ErrorCode.CANCELLED.value}
    ends = {"cancelled" if isinstance(o, asyncio.CancelledError) else o for o in outcomes}
    assert ends <= {"cancelled", "left", "finished"} | refusals
    await eventually(lambda: sum(dispatcher.in_flight().values()) == 0)
    assert all(dispatcher._traffic.in_flight(r.info.replica_id) == 0 for r in replicas)
    for replica in replicas:
        assert len(replica.terminals) == len(set(replica.terminals))
