"""The door over real replica services in this process: real engine, channels and dispatcher; no Ray."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from policies.control.store import LoadStore
from replicas.config import EngineConfig
from replicas.engine.batch import Runner
from replicas.engine.engine import Engine
from replicas.messages import ModelInfo
from replicas.service import ReplicaService
from replicas.socket_server import SocketServer
from replicas.text import TextCodec
from router.admission_control import AdmissionControl
from router.app_state import AppState
from router.config import AdmissionConfig
from router.dispatch import Dispatcher
from router.load_view import LoadView
from router.replica_connection import ConnectionTimes, Roster
from router.socket_client import SocketReplicaClient
from tests.eventually import eventually
from tests.replicas.codec import byte_codec
from tests.replicas.engine.scripted import ScriptedRunner
from tests.router.conftest import running
from tests.router.fakes import MODEL, FakeStore


class LocalReplica(SocketReplicaClient):
    """A service behind its socket. Once killed, it is gone as a killed process is."""

    def __init__(self, service: ReplicaService, engine: Engine, codec: TextCodec):
        self.service = service
        self.engine = engine
        self.sockets = SocketServer(service, "127.0.0.1")
        self.is_gone = False
        spec = engine.spec
        max_chars = codec.max_prompt_chars(spec.max_context)
        info = ModelInfo(MODEL, spec.modes, spec.max_context, spec.vocab_size, service.replica_id, max_chars)
        super().__init__(info, self.sockets.address)

    def kill(self) -> None:
        self.is_gone = True
        self.sockets.close()


@dataclass
class LocalDirectory:
    replicas: list[LocalReplica] = field(default_factory=list)

    async def roster(self) -> Roster:
        return Roster([replica for replica in self.replicas if not replica.is_gone])


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
    times: ConnectionTimes | None = None,
    **door: Any,
) -> AsyncIterator[Stack]:
    """A door over one service a runner. limits: of each engine. service, door: more for each."""
    config = EngineConfig(**(limits or {}))
    codec = codec or byte_codec()
    async with AsyncExitStack() as stack:
        replicas = []
        for number, runner in enumerate(runners or [ScriptedRunner()]):
            engine = Engine(runner, config)
            made = ReplicaService(engine, codec, f"replica-{number}", **(service or {}))
            made.start()
            stack.push_async_callback(made.stop)
            replica = LocalReplica(made, engine, codec)
            await replica.sockets.start()
            stack.callback(replica.sockets.close)
            replicas.append(replica)
        store = store or FakeStore()
        view = LoadView(store)
        admission = AdmissionControl(
            AdmissionConfig(max_running=config.max_running, max_waiting=config.max_waiting)
        )
        dispatcher = Dispatcher(
            LocalDirectory(replicas),
            view,
            admission,
            times=times or ConnectionTimes(reopen_s=0.01, max_reopen_s=0.05),
            discovery_period_s=0.02,
        )
        await stack.enter_async_context(running(dispatcher.run()))
        await stack.enter_async_context(running(view.run()))
        await eventually(lambda: len(dispatcher._connections.usable(())) == len(replicas), within_s=20.0)
        yield Stack(AppState(dispatcher, view, store, MODEL, 1_700_000_000, **door), replicas, dispatcher)
