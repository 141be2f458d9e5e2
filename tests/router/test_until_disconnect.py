"""Work that ends with its client."""

import asyncio

import pytest
from starlette.types import Message

from router.responses import run_until_disconnect


class Client:
    """What a server tells of a client: it is there until it goes."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()

    async def receive(self) -> Message:
        await self.gone.wait()
        return {"type": "http.disconnect"}


async def test_work_ends_by_itself_or_with_its_error() -> None:
    async def works() -> None:
        await asyncio.sleep(0)

    async def fails() -> None:
        await asyncio.sleep(0)
        raise ValueError("no")

    client = Client()
    await run_until_disconnect(client.receive, works)
    with pytest.raises(ValueError, match="no"):
        await run_until_disconnect(client.receive, fails)


async def test_a_client_that_goes_cancels_the_work_and_nothing_else() -> None:
    client, begun, ended = Client(), asyncio.Event(), []

    async def work() -> None:
        begun.set()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            await asyncio.sleep(0)  # what it has to give back takes time
            ended.append("work")

    async def answering() -> None:
        await run_until_disconnect(client.receive, work)
        await asyncio.sleep(0)
        ended.append("answering")

    task = asyncio.create_task(answering())
    await begun.wait()
    client.gone.set()
    await task
    assert ended == ["work", "answering"]
    assert not task.cancelling()


@pytest.mark.parametrize("client_goes_too", [False, True])
async def test_a_cancellation_from_outside_is_passed_on(client_goes_too: bool) -> None:
    client, begun, cancelled = Client(), asyncio.Event(), []

    async def work() -> None:
        begun.set()
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    task = asyncio.create_task(run_until_disconnect(client.receive, work))
    await begun.wait()
    if client_goes_too:
        client.gone.set()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cancelled == [True]
