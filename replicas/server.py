"""The Ray Serve deployment of one model server."""

import asyncio
import logging
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
from ray import serve

from policies.control.loop import check_running
from policies.control.plan import ReplicaPlan
from policies.control.plan_sync import PlanFollower
from policies.control.policy_setting import PolicyChoice, PolicyWatch
from policies.control.store import LoadStore
from policies.failures import Failures
from policies.registry import create_policy
from policies.replica_load import ReplicaLoad
from policies.scaling import demand
from replicas.calibration import warm_up
from replicas.config import ReplicaConfig
from replicas.cost_cache import SAVE_S, CostCache, read_pooled, starting_costs
from replicas.engine.engine import Engine
from replicas.messages import ModelInfo
from replicas.socket_server import SocketServer
from replicas.trace import SpanWriter
from replicas.wire import SocketAddress
from telemetry.logs import configure_logs
from telemetry.setup import Tracing

if TYPE_CHECKING:
    from replicas.workers import Workers

logger = logging.getLogger(__name__)

LAST_WORDS_S = 0.5
"""The time that a replica which is to end leaves its engine to notice and to tell its streams."""


class Replica:
    """The actor of a model server. Ingresses ask it to introduce itself, and then talk to its socket; the
    rest is for operators and Serve.

    Serve runs the constructor on the event loop that the calls will run on, and sends none before it is done.
    """

    def __init__(self, config: ReplicaConfig, redis_url: str):
        # Late, because these bring torch and transformers: who builds the application only names this class.
        from replicas.overhead import measure_overhead
        from replicas.runner_loader import load_runner
        from replicas.service import ReplicaService
        from replicas.text import TextCodec
        from replicas.workers import Workers

        configure_logs(config.log_format)
        self._workers = None if config.tensor_parallel == 1 else Workers.start(config)
        runner = load_runner(config) if self._workers is None else self._workers.runner
        codec = TextCodec.load(config.checkpoint, config.tool_parser, config.reasoning_parser)
        engine = Engine(runner, config)
        replica_id = serve.get_replica_context().replica_id.unique_id
        self._info = ModelInfo(
            replica_id=replica_id,
            name=config.model_name,
            modes=engine.spec.modes,
            has_sampler=engine.spec.sampler is not None,
            max_context=engine.spec.max_context,
            vocab_size=engine.spec.vocab_size,
            max_prompt_chars=codec.max_prompt_chars(engine.spec.max_context),
        )
        warm_up(runner, max_running=config.max_running, max_step_tokens=config.max_step_tokens)
        self._cost_cache = CostCache.of(config)
        pooled = read_pooled(redis_url, config.app, self._cost_cache.kind)
        overhead = measure_overhead(engine.spec, config, codec)
        costs = starting_costs(runner, config, self._cost_cache, pooled, overhead)
        runner.settle()
        engine.set_step_cost(costs.step)
        engine.set_yields(costs.yields)
        self._tracing = Tracing("replica", replica_id)
        tracer = self._tracing.tracer
        on_timeline = None if tracer is None else SpanWriter(tracer, replica_id)
        self._service = ReplicaService(engine, codec, replica_id, costs=costs, on_timeline=on_timeline)
        self._targets = config.targets
        self._store = LoadStore(redis_url, config.app)
        choice = PolicyChoice(config.policy, config.policy_params)
        watch = PolicyWatch(self._store, choice, lambda policy: self._follower.set_policy(policy))
        self._follower = PlanFollower(
            self._store,
            create_policy(config.policy, config.policy_params),
            self._load,
            self._apply,
            self._service.set_trial,
            watch.apply,
        )
        self._apply(self._follower.plan)
        self._stop = asyncio.Event()
        self._service.start()
        self._sockets = SocketServer(self._service, ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        self._listening = asyncio.create_task(self._sockets.start(), name="the start of the socket server")
        self._control = asyncio.create_task(self._follower.run(self._stop), name="the control loop")
        saving = asyncio.create_task(self._keep_costs(), name="the saving of costs")
        self._loops = [self._control, saving]
        if self._workers is not None:
            minding = asyncio.create_task(self._mind(self._workers), name="the watch over the workers")
            self._loops.append(minding)

    async def introduce(self) -> tuple[ModelInfo, SocketAddress]:
        """What an ingress must know to connect: calls and events go over a socket from then on."""
        return self._info, self._sockets.address

    async def replica_id(self) -> str:
        return self._service.replica_id

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
        if self._listening.done():
            self._listening.result()
        self._follower.check()

    async def __del__(self) -> None:
        """Stops the replica. Called by Serve, also for one whose constructor failed."""
        if not hasattr(self, "_control"):
            return
        # Serve knows nothing of the sockets, and kills this actor once its time is up.
        await self._sockets.drained()
        self._sockets.close()
        self._stop.set()
        await asyncio.wait((self._control,))  # which may have ended by an error of its own
        await self._service.stop()
        for loop in self._loops:
            loop.cancel()
        await asyncio.to_thread(self._save_costs)
        if self._workers is not None:
            self._workers.close()
        await self._store.close()
        await asyncio.to_thread(self._tracing.close)

    def _load(self) -> ReplicaLoad:
        return replace(self._service.snapshot(), num_tasks=len(asyncio.all_tasks()))

    async def _keep_costs(self) -> None:
        """Saves what was learned now and then, for the next start; a replica may end without notice."""
        failures = Failures("writing what was learned to Redis")
        while True:
            await asyncio.sleep(SAVE_S)
            await asyncio.to_thread(self._save_costs)
            costs = self._service.costs
            if costs is not None:
                with failures:
                    await self._store.write_learned(self._cost_cache.kind, self._cost_cache.text(costs))

    def _save_costs(self) -> None:
        costs = self._service.costs
        if costs is not None:
            self._cost_cache.save(costs)

    async def _mind(self, workers: "Workers") -> None:
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
