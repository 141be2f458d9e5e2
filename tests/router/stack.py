"""The door over real replica services in this process: real engine, channels and dispatcher; no Ray."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from policies.control.store import LoadStore
from replicas.engine.batch import Runner
from replicas.engine.engine import Engine
from replicas.messages import Accepted, Event, GenerateRequest, ModelInfo, Rejected
from replicas.service import ReplicaService
from replicas.text import TextCodec
from router.admission_control import AdmissionControl, QueueLimits
from router.api import AppState
from router.dispatch import Dispatcher
from router.load_view import LoadView
from router.replica_connection import LinkTimes, ReplicaClient, Roster
from tests.eventually import eventually
from tests.replicas.codec import byte_codec
from tests.replicas.engine.scripted import ScriptedRunner
from tests.router.conftest import running
from tests.router.fakes import MODEL, FakeStore


class LocalReplica(ReplicaClient):
    """A service called as Serve would call it. gone: its transport fails, as for a killed process."""

    def __init__(self, service: ReplicaService, engine: Engine, codec: TextCodec):
        self.service = service
        self.engine = engine
        spec = engine.spec
        max_chars = codec.max_prompt_chars(spec.max_context)
        self._info = ModelInfo(
            MODEL, spec.modes, spec.max_context, spec.vocab_size, service.replica_id, max_chars
        )
        self._gone = asyncio.Event()

    @property
    def info(self) -> ModelInfo:
        return self._info

    async def submit(self, request: GenerateRequest) -> Accepted | Rejected:
        self._check()
        return await self.service.submit(request)

    async def cancel(self, request_ids: tuple[str, ...]) -> None:
        self._check()
        await self.service.cancel(request_ids)

    async def channel(self, channel_id: str) -> AsyncGenerator[tuple[Event, ...], None]:
        self._check()
        stream = self.service.channel(channel_id)
        gone = asyncio.ensure_future(self._gone.wait())
        item: asyncio.Future[tuple[Event, ...]] = gone  # type: ignore[assignment]
        try:
            while True:
                item = asyncio.ensure_future(anext(stream))  # type: ignore[arg-type]
                await asyncio.wait({item, gone}, return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    raise ConnectionError("the replica is gone")
                try:
                    events = item.result()
                except StopAsyncIteration:
                    return
                yield events
        finally:
            gone.cancel()
            item.cancel()
            await asyncio.gather(gone, item, return_exceptions=True)
            await stream.aclose()  # type: ignore[attr-defined]

    def kill(self) -> None:
        self._gone.set()

    def _check(self) -> None:
        if self._gone.is_set():
            raise ConnectionError("the replica is gone")


@dataclass
class LocalDirectory:
    replicas: list[LocalReplica] = field(default_factory=list)

    async def roster(self) -> Roster:
        return Roster([replica for replica in self.replicas if not replica._gone.is_set()])


@dataclass
class Stack:
    door: AppState
    replicas: list[LocalReplica]
    dispatcher: Dispatcher

    async def settled(self) -> None:
        """Nothing runs any more, and every page is free."""
        for replica in self.replicas:
            await eventually(lambda r=replica: r.service.snapshot().num_in_flight == 0)  # type: ignore[misc]
        await eventually(lambda: sum(self.dispatcher.in_flight().values()) == 0)


@asynccontextmanager
async def a_stack(
    runners: Sequence[Runner] = (),
    *,
    codec: TextCodec | None = None,
    store: LoadStore | None = None,
    service: dict[str, Any] | None = None,
    limits: dict[str, int] | None = None,
    times: LinkTimes | None = None,
    **door: Any,
) -> AsyncIterator[Stack]:
    """A door over one service a runner. limits: of each engine. service, door: more for each."""
    limits = limits or {}
    codec = codec or byte_codec()
    async with AsyncExitStack() as stack:
        replicas = []
        for number, runner in enumerate(runners or [ScriptedRunner()]):
            engine = Engine(runner, **limits)
            made = ReplicaService(engine, codec, f"replica-{number}", **(service or {}))
            made.start()
            stack.push_async_callback(made.stop)
            replicas.append(LocalReplica(made, engine, codec))
        store = store or FakeStore()
        view = LoadView(store)
        admission = AdmissionControl(
            limits.get("max_running", 64), QueueLimits(limits.get("max_waiting", 256))
        )
        dispatcher = Dispatcher(
            LocalDirectory(replicas),
            view,
            admission,
            times=times or LinkTimes(reopen_s=0.01, max_reopen_s=0.05),
            discovery_period_s=0.02,
        )
        await stack.enter_async_context(running(dispatcher.run()))
        await stack.enter_async_context(running(view.run()))
        await eventually(lambda: dispatcher.ready, within_s=20.0)
        yield Stack(AppState(dispatcher, view, store, MODEL, 1_700_000_000, **door), replicas, dispatcher)
