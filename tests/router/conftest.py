import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from router.admission import AdmissionControl
from router.dispatch import Dispatcher
from router.link import LinkTimes
from router.load_view import LoadView
from tests.eventually import eventually
from tests.router.fakes import FakeDirectory, FakeStore, ScriptedReplica

QUICK = LinkTimes(silence_s=5.0, call_s=1.0, reopen_s=0.001, max_reopen_s=0.01)

StartDispatcher = Callable[..., "asyncio.Future[Dispatcher]"]


@asynccontextmanager
async def running(coroutine) -> AsyncIterator[None]:
    task = asyncio.create_task(coroutine)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
async def start() -> AsyncIterator[StartDispatcher]:
    """Starts a dispatcher over replicas and waits until it reaches them all."""
    async with AsyncExitStack() as stack:

        async def start(
            *replicas: ScriptedReplica,
            store: FakeStore | None = None,
            directory: FakeDirectory | None = None,
            times: LinkTimes = QUICK,
            max_waiting: int = 8,
        ) -> Dispatcher:
            directory = directory or FakeDirectory(list(replicas))
            view = LoadView(store or FakeStore())
            await view.refresh()
            dispatcher = Dispatcher(
                directory, view, AdmissionControl(4, max_waiting), times=times, discovery_period_s=0.005
            )
            await stack.enter_async_context(running(dispatcher.run()))
            await eventually(lambda: all(replica.num_channels for replica in replicas))
            await eventually(lambda: dispatcher.ready or not replicas)
            return dispatcher

        yield start
