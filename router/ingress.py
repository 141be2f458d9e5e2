"""The Serve deployment of the HTTP door, and the only place where the router touches Ray.

Each ingress keeps a connection to every replica and picks the replica of each request itself. It learns by
Serve's `DeploymentHandle.broadcast` which replicas run and where each listens; calls and events then go over
a socket (`router/socket_client.py`). So the replicas stay one ordinary deployment, which Serve restarts,
drains and scales as any other.
"""

import asyncio
import contextvars
import logging
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from prometheus_client.metrics_core import Metric
from ray import serve
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentBroadcastResponse, DeploymentHandle

from policies.control.controller import Controller
from policies.control.policy_setting import PolicyChoice, PolicyWatch
from policies.control.store import LoadStore
from policies.registry import create_policy
from router.admission_control import AdmissionControl
from router.api import create_app
from router.app_state import AppState
from router.auth import KeyRing
from router.config import IngressConfig
from router.dispatch import Dispatcher
from router.limits import KeyLimiter
from router.load_view import LoadView
from router.metrics import Metrics
from router.operate import keep_reading
from router.replica_connection import Roster
from router.socket_client import SocketReplicaClient
from telemetry.logs import configure_logs
from telemetry.setup import Tracing

logger = logging.getLogger(__name__)

ROSTER_TIMEOUT_S = 5.0
SIBLINGS_TIMEOUT_S = 2.0


class ServeDirectory:
    """router.replica_connection.Directory over a deployment's running replicas."""

    def __init__(self, handle: DeploymentHandle[Any]):
        self._handle = handle

    async def roster(self) -> Roster:
        broadcast = contextvars.Context().run(self._handle.broadcast, "introduce")
        try:
            answers = await broadcast.results_async(timeout_s=ROSTER_TIMEOUT_S, return_exceptions=True)
        except DeploymentUnavailableError:
            # None runs. A last one that Serve stops ends only when its channel is let go of.
            return Roster(())
        clients = [SocketReplicaClient(*answer) for answer in answers if isinstance(answer, tuple)]
        return Roster(clients, complete=len(clients) == len(answers))


async def answers_in_time(broadcast: DeploymentBroadcastResponse) -> list[Any]:
    """The answers of all, errors too; none where one has not answered in time, or none runs."""
    try:
        return list(await broadcast.results_async(timeout_s=SIBLINGS_TIMEOUT_S, return_exceptions=True))
    except (TimeoutError, DeploymentUnavailableError) as error:
        logger.warning("the other ingresses' figures are left out: %r", error)
        return []


@serve.ingress()
class Ingress:
    """Serves HTTP; its controller stands ready to lead.

    deployed_with: what belongs to the app without being called from here; Serve deploys what it
    finds among the arguments.
    """

    def __init__(
        self,
        config: IngressConfig,
        redis_url: str,
        replicas: DeploymentHandle[Any],
        deployed_with: tuple[DeploymentHandle[Any], ...] = (),
    ):
        configure_logs(config.log_format)
        keys = KeyRing.load(config.api_keys_file)
        instance = secrets.token_hex(4)
        self._tracing = Tracing("ingress", instance)
        self._metrics = Metrics(config.model_name, instance)
        self._store = LoadStore(redis_url, config.app)
        timeout_s = config.limits_timeout_s
        self._limiter = KeyLimiter(
            LoadStore(redis_url, config.app, connect_timeout_s=timeout_s, command_timeout_s=timeout_s),
            config.limits_without_redis,
        )
        self._view = LoadView(self._store)
        self._controller = Controller(
            self._store,
            create_policy(config.policy, config.policy_params),
            on_view=lambda view, asked_at_s: self._view.take(view.loads, asked_at_s),
        )
        self._policy = PolicyWatch(
            self._store, PolicyChoice(config.policy, config.policy_params), self._controller.set_policy
        )
        self._dispatcher = Dispatcher(ServeDirectory(replicas), self._view, AdmissionControl(config))
        self._metrics.seen.num_in_flight = lambda: sum(self._dispatcher.in_flight().values())
        self._app_state = AppState(
            self._dispatcher,
            self._view,
            self._store,
            config.model_name,
            int(time.time()),
            config=config,
            keys=keys,
            limiter=self._limiter,
            policy=self._policy,
            metrics=self._metrics,
            siblings=self._siblings,
            tracer=self._tracing.tracer,
            answers_id=False,  # Serve's own server does, but for what comes by router.direct
        )
        self._app: FastAPI | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: tuple[asyncio.Task[None], ...] = ()
        self._instance = instance

    def __serve_build_asgi_app__(self) -> FastAPI:
        self._app = create_app(self._app_state, self._background())
        return self._app

    def direct_app(self) -> FastAPI | None:
        """As of router.direct.HasDirectApp."""
        return self._app if asyncio.get_running_loop() is self._loop else None

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
        self._loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        controlling = asyncio.create_task(self._controller.run(stop), name="the controller")
        self._tasks = (
            controlling,
            asyncio.create_task(self._view.run(), name="the load view"),
            asyncio.create_task(self._dispatcher.run(), name="the dispatcher"),
            asyncio.create_task(self._policy.run(), name="the policy watch"),
            asyncio.create_task(self._app_state.keys.run(), name="the key ring"),
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
