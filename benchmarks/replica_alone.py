"""A replica in this process, as Serve runs it but without Serve: engine, text, channel, and its own policy.

It never reaches a store, so it decides alone, by the same policy object that a controller runs, from the
same load, five times a second.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path

from benchmarks.load import LoadError
from benchmarks.modes import CHECKPOINT
from benchmarks.stream_client import Tally
from policies.control.plan import ObservedPlan
from policies.control.plan_sync import PlanFollower
from policies.control.store import LoadStore, StoreUnavailable
from policies.cost import ReplicaCosts
from policies.registry import create_policy
from policies.replica_load import ReplicaLoad
from replicas.calibration import calibrate
from replicas.config import EngineConfig
from replicas.engine.engine import Engine
from replicas.messages import (
    Accepted,
    DecodingOptions,
    Delta,
    Event,
    Failed,
    GenerateRequest,
    SamplingParams,
)
from replicas.model.runner import TorchRunner
from replicas.service import ReplicaService
from replicas.text import TextCodec
from replicas.yields_file import read_yields

MAX_RUNNING = 64
MAX_STEP_TOKENS = 512
CALIBRATION_S = 3.0
CHANNEL = "benchmark"


class NoStore(LoadStore):
    """A store that connects to nothing."""

    def __init__(self) -> None:
        super().__init__("redis://127.0.0.1:1/0", "benchmark")

    async def publish_and_read(self, load: ReplicaLoad) -> ObservedPlan | None:
        raise StoreUnavailable("a benchmark of one replica")

    async def withdraw(self, replica_id: str) -> None:
        pass


class ReplicaAlone:
    """A replica without Serve, and the channel of its events. Requests go in by ask(); each waits for its own
    last event."""

    def __init__(self, service: ReplicaService, engine: Engine):
        self._engine = engine
        self._service = service
        self._numbers = count()
        self._inboxes: dict[str, asyncio.Queue[Event]] = {}
        self._loop = asyncio.get_running_loop()
        service.open_channel(CHANNEL, self)

    @property
    def host_s(self) -> float:
        """CPU seconds so far of the engine's thread beside forwards."""
        return self._engine.host_s

    def send(self, events: Sequence[Event]) -> None:
        self._loop.call_soon_threadsafe(self._hand_out, events)

    def end(self) -> None:
        pass

    def _hand_out(self, events: Sequence[Event]) -> None:
        for event in events:
            self._inboxes[event.request_id].put_nowait(event)

    async def ask(
        self, prompt: str, max_tokens: int, ignore_eos: bool, decoding: DecodingOptions, tally: Tally
    ) -> None:
        """Answers one prompt, and notes in the tally what arrives. Raises LoadError where it fails."""
        name = str(next(self._numbers))
        inbox: asyncio.Queue[Event] = asyncio.Queue()
        self._inboxes[name] = inbox
        messages = ({"role": "user", "content": prompt},)
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=ignore_eos)
        began_s, first_s = time.perf_counter(), None
        reply = await self._service.submit(GenerateRequest(name, CHANNEL, (messages,), sampling, decoding))
        if not isinstance(reply, Accepted):
            raise LoadError(reply.message)
        while isinstance(event := await inbox.get(), Delta):
            first_s = first_s or time.perf_counter()
            tally.num_tokens += event.num_tokens
            tally.num_chunks += 1
        del self._inboxes[name]
        if isinstance(event, Failed):
            raise LoadError(event.message)
        tally.note_end(began_s, first_s, event.num_completion_tokens)


@asynccontextmanager
async def replica_alone(
    num_threads: int, checkpoint: Path = CHECKPOINT, dtype: str = "float32"
) -> AsyncIterator[ReplicaAlone]:
    runner = TorchRunner.load(str(checkpoint), dtype=dtype, num_threads=num_threads)
    engine = Engine(runner, EngineConfig(max_running=MAX_RUNNING, max_step_tokens=MAX_STEP_TOKENS))
    step = calibrate(runner, max_running=MAX_RUNNING, max_step_tokens=MAX_STEP_TOKENS, budget_s=CALIBRATION_S)
    costs = ReplicaCosts(step, read_yields(checkpoint))
    engine.set_step_cost(step)
    service = ReplicaService(engine, TextCodec.load(str(checkpoint)), "alone", costs=costs)
    follower = PlanFollower(
        NoStore(),
        create_policy("cost_model", {"quality": "any"}),
        service.snapshot,
        lambda plan: service.set_plan(plan.decode, plan.rule),
        service.set_trial,
    )
    service.set_plan(follower.plan.decode, follower.plan.rule)
    service.start()
    alone = ReplicaAlone(service, engine)
    stop = asyncio.Event()
    following = asyncio.create_task(follower.run(stop))
    try:
        yield alone
    finally:
        stop.set()
        await following
        await service.stop()
