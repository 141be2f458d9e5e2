"""The Serve deployment of the HTTP door, and the only place where the router touches Ray.

Each ingress keeps a channel to every replica and picks the replica of each request itself, so it
must reach a given replica. Serve's own extension points do that: `AddressedRouter`, a request
router that sends a call to the replica named by the handle's `session_id`, and
`DeploymentHandle.broadcast` to learn which replicas run. So the replicas stay one ordinary
deployment, which Serve restarts, drains and scales as any other; single-replica deployments by
number would need none of this, but their number could not change while serving.

Calls go by Serve's gRPC transport, not as Ray actor calls. An item of a channel then costs half the
CPU time and a plain call less than a third; and when an ingress is killed its channels break at the
replicas, whereas as actor calls they would stay open there, with their requests, for nobody.
"""

import asyncio
import contextvars
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from prometheus_client.metrics_core import Metric
from ray import serve
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentBroadcastResponse, DeploymentHandle
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from policies.control.controller import Controller
from policies.control.policy_setting import PolicyChoice, PolicyWatch
from policies.control.store import LoadStore
from policies.registry import create_policy
from replicas.messages import Accepted, Event, GenerateRequest, ModelInfo, Rejected
from router.admission_control import AdmissionControl, QueueLimits
from router.api import AppState, create_app
from router.auth import KeyRing
from router.config import AccessConfig, Bounds
from router.dispatch import Dispatcher
from router.limits import KeyLimiter
from router.load_view import LoadView
from router.metrics import Metrics
from router.operate import keep_reading
from router.replica_connection import Roster
from telemetry.logs import configure_logs
from telemetry.setup import Tracing

logger = logging.getLogger(__name__)

ROSTER_TIMEOUT_S = 5.0
SIBLINGS_TIMEOUT_S = 2.0


class AddressedRouter(RequestRouter):
    """Routes a call to the replica whose unique id is the handle's `session_id`.

    A call for a replica that is not running fails at once with ReplicaUnavailableError.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None:
            return [candidate_replicas]
        # Without this Serve asks again in a loop that never yields while the replica is at its limit.
        pending_request.routing_context.should_backoff = True
        target = pending_request.metadata.session_id
        chosen = [replica for replica in candidate_replicas if replica.replica_id.unique_id == target]
        if chosen:
            return [chosen]
        if not pending_request.future.done():
            pending_request.future.set_exception(ReplicaUnavailableError(f"replica {target} is not running"))
        # Serve looks at the future before it uses these.
        return [candidate_replicas]


class ServeReplicaClient:
    """router.replica_connection.ReplicaClient over a handle whose deployment routes by AddressedRouter."""

    def __init__(self, handle: DeploymentHandle[Any], info: ModelInfo):
        self.info = info
        addressed = over_grpc(handle).options(session_id=info.replica_id)
        self._submit = addressed.options(method_name="submit")
        self._cancel = addressed.options(method_name="cancel")
        self._channel = addressed.options(method_name="channel", stream=True)

    async def submit(self, request: GenerateRequest) -> Accepted | Rejected:
        reply: Accepted | Rejected = await _call(self._submit, request)
        return reply

    async def cancel(self, request_ids: tuple[str, ...]) -> None:
        await _call(self._cancel, request_ids)

    async def channel(self, channel_id: str) -> AsyncGenerator[tuple[Event, ...], None]:
        stream = _call(self._channel, channel_id)
        try:
            async for events in stream:
                yield events
        finally:
            stream.cancel()


class ServeDirectory:
    """router.replica_connection.Directory over a deployment's running replicas."""

    def __init__(self, handle: DeploymentHandle[Any]):
        self._handle = over_grpc(handle)

    async def roster(self) -> Roster:
        broadcast = contextvars.Context().run(self._handle.broadcast, "model_info")
        try:
            answers = await broadcast.results_async(timeout_s=ROSTER_TIMEOUT_S, return_exceptions=True)
        except DeploymentUnavailableError:
            # None runs. A last one that Serve stops ends only when its channel is let go of.
            return Roster(())
        infos = [answer for answer in answers if isinstance(answer, ModelInfo)]
        clients = [ServeReplicaClient(self._handle, info) for info in infos]
        return Roster(clients, complete=len(infos) == len(answers))


async def answers_in_time(broadcast: DeploymentBroadcastResponse) -> list[Any]:
    """The answers of all, errors too; none where one has not answered in time, or none runs."""
    try:
        return list(await broadcast.results_async(timeout_s=SIBLINGS_TIMEOUT_S, return_exceptions=True))
    except (TimeoutError, DeploymentUnavailableError) as error:
        logger.warning("the other ingresses' figures are left out: %r", error)
        return []


def over_grpc(handle: DeploymentHandle[Any]) -> DeploymentHandle[Any]:
    # Messages are plain records of importable classes, so plain pickle does, and is the fastest.
    return handle.options(
        _by_reference=False, request_serialization="pickle", response_serialization="pickle"
    )


def _call(method: DeploymentHandle[Any], *args: Any) -> Any:
    """Calls in a context of its own: Serve gives calls made while serving one HTTP request one id, and its
    routers, which find a waiting call by that id, then may mix up calls to different replicas."""
    return contextvars.Context().run(method.remote, *args)


@dataclass(frozen=True, slots=True)
class IngressConfig:
    """An ingress's settings, checked by cluster.config, where each field is explained to operators."""

    app: str
    model_name: str
    redis_url: str = field(repr=False)
    policy: str
    policy_params: Mapping[str, Any]
    max_running: int
    """The requests that one replica runs at once, for admission."""
    queue_limits: QueueLimits
    """The limits of one replica, for admission."""
    bounds: Bounds = field(default_factory=Bounds)
    access: AccessConfig = field(default_factory=AccessConfig)
    model_aliases: tuple[str, ...] = ()
    """Further names by which clients may ask for the model."""
    stream_interval_s: float = 0.0
    shared_prefix_cache: bool = False
    log_format: str = "text"


@serve.ingress()
class Ingress:
    """Serves HTTP; its controller stands ready to lead.

    deployed_with: what belongs to the app without being called from here; Serve deploys what it
    finds among the arguments.
    """

    def __init__(
        self,
        config: IngressConfig,
        replicas: DeploymentHandle[Any],
        deployed_with: tuple[DeploymentHandle[Any], ...] = (),
    ):
        configure_logs(config.log_format)
        keys = KeyRing.load(config.access.api_keys_file)
        instance = secrets.token_hex(4)
        self._tracing = Tracing("ingress", instance)
        self._metrics = Metrics(config.model_name, instance)
        self._store = LoadStore(config.redis_url, config.app)
        timeout_s = config.access.limits_timeout_s
        self._limiter = KeyLimiter(
            LoadStore(config.redis_url, config.app, connect_timeout_s=timeout_s, command_timeout_s=timeout_s),
            config.access.limits_without_redis,
        )
        self._controller = Controller(self._store, create_policy(config.policy, config.policy_params))
        self._policy = PolicyWatch(
            self._store, PolicyChoice(config.policy, config.policy_params), self._controller.set_policy
        )
        self._view = LoadView(self._store)
        self._dispatcher = Dispatcher(
            ServeDirectory(replicas), self._view, AdmissionControl(config.max_running, config.queue_limits)
        )
        self._metrics.seen.num_in_flight = lambda: sum(self._dispatcher.in_flight().values())
        self._door = AppState(
            self._dispatcher,
            self._view,
            self._store,
            config.model_name,
            int(time.time()),
            bounds=config.bounds,
            keys=keys,
            cors_origins=config.access.cors_origins,
            model_aliases=config.model_aliases,
            stream_interval_s=config.stream_interval_s,
            shared_prefix_cache=config.shared_prefix_cache,
            limiter=self._limiter,
            policy=self._policy,
            metrics=self._metrics,
            siblings=self._siblings,
            tracer=self._tracing.tracer,
            answers_id=False,  # Serve's own server does
        )
        self._tasks: tuple[asyncio.Task[None], ...] = ()
        self._instance = instance

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._door, self._background())

    async def figures(self) -> tuple[str, list[Metric]]:
        """This ingress's name and the figures that it counts, for the ingress that is scraped."""
        return self._instance, self._metrics.own_families()

    async def _siblings(self) -> list[Metric]:
        context = serve.get_replica_context()
        handle = serve.get_deployment_handle(context.deployment, context.app_name)
        broadcast = contextvars.Context().run(handle.broadcast, "figures")
        found = [answer for answer in await answers_in_time(broadcast) if isinstance(answer, tuple)]
        return [family for instance, families in found if instance != self._instance for family in families]

    async def drain(self) -> int:
        """Refuses new requests with 503 from now on. Returns how many are still here."""
        self._dispatcher.drain()
        return sum(self._dispatcher.in_flight().values())

    async def check_health(self) -> None:
        """Raises when a loop has ended, which none does by itself."""
        for task in self._tasks:
            if task.done():
                raise RuntimeError(f"{task.get_name()} has ended") from task.exception()

    @asynccontextmanager
    async def _background(self) -> AsyncIterator[None]:
        stop = asyncio.Event()
        controlling = asyncio.create_task(self._controller.run(stop), name="the controller")
        self._tasks = (
            controlling,
            asyncio.create_task(self._view.run(), name="the load view"),
            asyncio.create_task(self._dispatcher.run(), name="the dispatcher"),
            asyncio.create_task(self._policy.run(), name="the policy watch"),
            asyncio.create_task(self._door.keys.run(), name="the key ring"),
            asyncio.create_task(keep_reading(self._metrics, self._store), name="the metrics' reading"),
        )
        try:
            yield
        finally:
            running, self._tasks = self._tasks, ()
            stop.set()
            for task in running:
                if task is not controlling:  # it hands its lease over
                    task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            await self._limiter.close()
            await self._store.close()
            await asyncio.to_thread(self._close_telemetry)

    def _close_telemetry(self) -> None:
        self._metrics.close()
        self._tracing.close()
