"""A replica in this process, as Serve runs it but without Serve: engine, text, channel, and its own policy.

It never reaches a store, so it decides alone, by the same policy object that a controller runs, from the
same load, five times a second.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count

from benchmarks.load import Answered
from benchmarks.modes import CHECKPOINT
from policies.control.plan import ObservedPlan
from policies.control.plan_sync import PlanFollower
from policies.control.store import LoadStore, StoreUnavailable
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
    """A replica without Serve. Requests go in by complete(); each waits for its own last event."""

    def __init__(self, service: ReplicaService, follower: PlanFollower):
        self._service = service
        self._follower = follower
        self._numbers = count()
        self._inboxes: dict[str, asyncio.Queue[Event]] = {}

    def set_policy(self, name: str) -> None:
        """Sets the policy between two windows, with nothing running. It goes on from the plan in force."""
        self._follower.set_policy(create_policy(name, {}))

    async def hand_out(self, stream: AsyncIterator[tuple[Event, ...]]) -> None:
        async for events in stream:
            for event in events:
                self._inboxes[event.request_id].put_nowait(event)

    async def complete(self, prompt: str, max_tokens: int, decoding: DecodingOptions) -> Answered:
        """Answers one prompt. Raises RuntimeError where it fails."""
        name = str(next(self._numbers))
        inbox: asyncio.Queue[Event] = asyncio.Queue()
        self._inboxes[name] = inbox
        messages = ({"role": "user", "content": prompt},)
        request = GenerateRequest(
            name, CHANNEL, (messages,), SamplingParams(max_tokens=max_tokens, temperature=0.0), decoding
        )
        began_s = time.perf_counter()
        reply = await self._service.submit(request)
        if not isinstance(reply, Accepted):
            raise RuntimeError(reply.message)
        first_s: float | None = None
        while isinstance(event := await inbox.get(), Delta):
            first_s = first_s or time.perf_counter()
        del self._inboxes[name]
        if isinstance(event, Failed):
            raise RuntimeError(event.message)
        ended_s = time.perf_counter()
        return Answered((first_s or ended_s) - began_s, ended_s - began_s, event.num_completion_tokens)


@asynccontextmanager
async def replica_alone(num_threads: int) -> AsyncIterator[ReplicaAlone]:
    runner = TorchRunner.load(str(CHECKPOINT), num_threads=num_threads)
    engine = Engine(runner, EngineConfig(max_running=MAX_RUNNING, max_step_tokens=MAX_STEP_TOKENS))
    cost = calibrate(runner, max_running=MAX_RUNNING, max_step_tokens=MAX_STEP_TOKENS, budget_s=CALIBRATION_S)
    engine.set_step_cost(cost)
    service = ReplicaService(engine, TextCodec.load(str(CHECKPOINT)), "alone", step_cost=cost)
    follower = PlanFollower(
        NoStore(),
        create_policy("cost_model", {}),
        service.snapshot,
        lambda plan: service.set_plan(plan.decode, plan.rule),
        service.set_explored_plans,
    )
    service.set_plan(follower.plan.decode, follower.plan.rule)
    service.start()
    alone = ReplicaAlone(service, follower)
    stop = asyncio.Event()
    stream = service.channel(CHANNEL)
    await anext(stream)  # it is open
    reading = asyncio.create_task(alone.hand_out(stream))
    following = asyncio.create_task(follower.run(stop))
    try:
        yield alone
    finally:
        stop.set()
        await following
        await service.stop()
        await reading
