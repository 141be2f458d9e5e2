import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from router.admission_control import AdmissionControl
from router.app_state import AppState
from router.config import AdmissionConfig
from router.dispatch import Dispatcher
from router.load_view import LoadView
from router.replica_connection import ConnectionTimes
from tests.eventually import eventually
from tests.router.fakes import MODEL, FakeDirectory, FakeStore, ScriptedReplica

QUICK = ConnectionTimes(silence_s=5.0, call_s=1.0, reopen_s=0.001, max_reopen_s=0.01)

StartDispatcher = Callable[..., Awaitable[Dispatcher]]


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
            times: ConnectionTimes = QUICK,
            max_waiting: int = 8,
            max_waiting_tokens: int | None = None,
        ) -> Dispatcher:
            directory = directory or FakeDirectory(list(replicas))
            view = LoadView(store or FakeStore())
            await view.refresh()
            config = AdmissionConfig(
                max_running=4, max_waiting=max_waiting, max_waiting_tokens=max_waiting_tokens
            )
            admission = AdmissionControl(config)
            dispatcher = Dispatcher(directory, view, admission, times=times, discovery_period_s=0.005)
            await stack.enter_async_context(running(dispatcher.run()))
            await eventually(lambda: all(replica.num_channels for replica in replicas))
            await eventually(lambda: dispatcher.ready or not replicas)
            return dispatcher

        yield start


@pytest.fixture
def make_door(start: StartDispatcher) -> Callable[..., Awaitable[AppState]]:
    async def make_door(*replicas: ScriptedReplica, store: FakeStore | None = None, **more: Any) -> AppState:
        store = store or FakeStore()
        dispatcher = await start(*replicas, store=store)
        return AppState(dispatcher, dispatcher._view, store, MODEL, 1_700_000_000, **more)

    return make_door


@asynccontextmanager
async def in_process(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """A client that calls the app without a socket."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@asynccontextmanager
async def over_http(app: FastAPI) -> AsyncIterator[str]:
    """The app behind a real server on loopback; yields its URL."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on"))
        serving = asyncio.create_task(server.serve([listener]))
        try:
            await eventually(lambda: server.started)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await serving
