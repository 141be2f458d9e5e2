"""The Ray Serve deployment of one model server."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from ray import serve

from policies.control.plan import ReplicaPlan
from policies.control.plan_sync import PlanFollower
from policies.control.policy_setting import PolicyChoice, PolicyWatch
from policies.control.store import LoadStore
from policies.registry import create_policy
from policies.replica_load import ReplicaLoad
from policies.scaling import demand
from replicas.calibration import calibrate
from replicas.config import ReplicaConfig
from replicas.engine.engine import Engine
from replicas.messages import Accepted, Event, GenerateRequest, ModelInfo, Rejected
from replicas.net import check_running
from replicas.runner_loader import load_runner
from replicas.service import ReplicaService
from replicas.text import TextCodec
from replicas.trace import SpanWriter
from replicas.workers import Workers
from telemetry.logs import configure_logs
from telemetry.setup import Tracing

logger = logging.getLogger(__name__)

LAST_WORDS_S = 0.5
"""The time that a replica which is to end leaves its engine to notice and to tell its streams."""


class Replica:
    """The actor of a model server. The router calls submit, cancel and channel; the rest is for operators and
    Serve.

    Serve runs the constructor on the event loop that the calls will run on, and sends none before it is done.
    """

    def __init__(self, config: ReplicaConfig):
        self._workers = None if config.tensor_parallel == 1 else Workers.start(config)
        runner = load_runner(config) if self._workers is None else self._workers.runner
        codec = TextCodec.load(config.checkpoint, config.tool_parser, config.reasoning_parser)
        engine = Engine(
            runner,
            max_running=config.max_running,
            max_waiting=config.max_waiting,
            max_step_tokens=config.max_step_tokens,
            max_prefill_tokens=config.max_prefill_tokens,
            max_step_ms=config.max_step_ms,
            overlap_blocks=config.overlap_blocks,
        )
        replica_id = serve.get_replica_context().replica_id.unique_id
        self._info = ModelInfo(
            replica_id=replica_id,
            name=config.served_model_name,
            modes=engine.spec.modes,
            max_context=engine.spec.max_context,
            vocab_size=engine.spec.vocab_size,
            max_prompt_chars=codec.max_prompt_chars(engine.spec.max_context),
        )
        step_cost = calibrate(
            runner,
            max_running=config.max_running,
            max_step_tokens=config.max_step_tokens,
            budget_s=config.calibration_s,
        )
        engine.set_step_cost(step_cost)
        configure_logs(config.log_format)
        self._tracing = Tracing("replica", replica_id)
        tracer = self._tracing.tracer
        on_timeline = None if tracer is None else SpanWriter(tracer, replica_id)
        self._service = ReplicaService(
            engine, codec, replica_id, step_cost=step_cost, on_timeline=on_timeline
        )
        self._targets = config.targets
        self._store = LoadStore(config.redis_url, config.app)
        choice = PolicyChoice(config.policy, config.policy_params)
        watch = PolicyWatch(self._store, choice, lambda policy: self._follower.set_policy(policy))
        self._follower = PlanFollower(
            self._store,
            create_policy(config.policy, config.policy_params),
            self._load,
            self._apply,
            self._service.set_explored_plans,
            watch.heed,
        )
        self._apply(self._follower.plan)
        self._stop = asyncio.Event()
        self._service.start()
        self._control = asyncio.create_task(self._follower.run(self._stop), name="the control loop")
        self._loops = [self._control]
        if self._workers is not None:
            minding = asyncio.create_task(self._mind(self._workers), name="the watch over the workers")
            self._loops.append(minding)

    async def model_info(self) -> ModelInfo:
        return self._info

    async def replica_id(self) -> str:
        return self._service.replica_id

    async def submit(self, request: GenerateRequest) -> Accepted | Rejected:
        """Validates and queues a request; its events go to its channel, and end with exactly one last."""
        return await self._service.submit(request)

    async def cancel(self, request_ids: tuple[str, ...]) -> None:
        await self._service.cancel(request_ids)

    async def channel(self, channel_id: str) -> AsyncIterator[tuple[Event, ...]]:
        """The events of all requests submitted with this channel, one item a step.

        An empty item comes at once and about every second. When the stream ends or is closed, its
        requests are cancelled.
        """
        async for events in self._service.channel(channel_id):
            yield events

    async def state(self) -> dict[str, Any]:
        return await self._service.state()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """The demand, by which Serve scales: its own count of calls says nothing, tokens travel on
        channels."""
        # Beside the loop: it takes tens of ms, and streams wait for none of it.
        load = self._service.snapshot()
        return (await asyncio.to_thread(demand, load, self._follower.plan_at, self._targets)).report()

    async def check_health(self) -> None:
        """Raises RuntimeError when the replica should be replaced. Called by Serve."""
        self._service.check()
        check_running(self._loops)

    async def __del__(self) -> None:
        """Stops the replica. Called by Serve, also for one whose constructor failed."""
        if not hasattr(self, "_control"):
            return
        self._stop.set()
        await asyncio.wait((self._control,))  # which may have ended by an error of its own
        await self._service.stop()
        if self._workers is not None:
            for loop in self._loops:
                loop.cancel()
            self._workers.close()
        await self._store.close()
        await asyncio.to_thread(self._tracing.close)

    def _load(self) -> ReplicaLoad:
        return replace(self._service.snapshot(), num_tasks=len(asyncio.all_tasks()))

    async def _mind(self, workers: Workers) -> None:
        """Ends this process with the first of the others to end: the part of the model it had is gone.

        A step under way may wait for it for ever, on a GPU even past all timeouts, so nothing milder will
        do. The routers tell of it to the streams that the engine could not, and Serve starts another replica.
        """
        reason = await workers.lost()
        logger.critical("%s; this replica ends with it", reason)
        await asyncio.sleep(LAST_WORDS_S)
        os._exit(1)

    def _apply(self, plan: ReplicaPlan) -> None:
        self._service.set_plan(plan.decode, plan.rule)
