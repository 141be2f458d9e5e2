"""`serve run cluster.app:deploy`: the builder of the whole application."""

# No `from __future__ import annotations` here: Serve reads the annotation of deploy()'s parameter,
# and as a string it would leave the configuration an unchecked dict.

from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import LoggingConfig

from cluster.autoscaling import autoscaling_config
from cluster.config import ClusterConfig
from cluster.embedded_redis import Endpoint
from cluster.redis_server import RedisServer
from replicas.config import ReplicaConfig
from replicas.server import Replica
from router.config import IngressConfig
from router.ingress import Ingress

UNLIMITED = 100_000
"""The ongoing requests an actor may have. Admission and the replica's queue are the bounds."""

ONE_LOOP = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}
"""Has an ingress run on the event loop of Serve's HTTP server, which router.direct needs. A replica stays on
a thread of its own, whose loop is not Ray's."""


def deploy(args: ClusterConfig) -> Application:
    """Builds the replicas, the ingresses and, without a redis_url, a Redis."""
    deployed_with: tuple[Any, ...] = ()
    redis_url = args.redis_url
    if redis_url is None:
        endpoint = Endpoint.draw()
        redis_url = endpoint.url
        deployed_with = (_redis_server(endpoint),)
    return _bind(
        "Ingress",
        Ingress,
        args.num_ingresses,
        {"num_cpus": args.ingress_cpus, "runtime_env": {"env_vars": ONE_LOOP}},
        args.drain_timeout_s,
        (IngressConfig.of(args), redis_url, _replicas(args, redis_url), deployed_with),
        logging_config=_logging(args),
    )


def _redis_server(endpoint: Endpoint) -> Application:
    return _bind("Redis", RedisServer, 1, {"num_cpus": 0}, 10.0, (endpoint,))


def _replicas(args: ClusterConfig, redis_url: str) -> Application:
    parallel: dict[str, Any] = {}
    if args.tensor_parallel > 1:
        # The replica is in the first bundle, its workers are in the others, all on one machine.
        resources = {"CPU": args.replica_cpus, "GPU": args.num_gpus}
        bundle = {name: amount for name, amount in resources.items() if amount}
        parallel = {
            "placement_group_bundles": [bundle] * args.tensor_parallel,
            "placement_group_strategy": "STRICT_PACK",
        }
    number: int | AutoscalingConfig = args.num_replicas
    if args.max_replicas is not None:
        number = autoscaling_config(
            **args.replica_range._asdict(),
            upscale_delay_s=args.upscale_delay_s,
            downscale_delay_s=args.downscale_delay_s,
        )
    return _bind(
        "Replica",
        Replica,
        number,
        {"num_cpus": args.replica_cpus, "num_gpus": args.num_gpus},
        args.drain_timeout_s,
        (ReplicaConfig.of(args), redis_url),
        logging_config=_logging(args),
        **parallel,
    )


def _logging(args: ClusterConfig) -> LoggingConfig:
    """Serve's own log, without requests: the ingress has a log of them, and asks each replica every second
    who it is."""
    encoding = "JSON" if args.log_format == "json" else "TEXT"
    return LoggingConfig.model_validate({"encoding": encoding, "enable_access_log": False})


def _bind(
    name: str,
    cls: type,
    number: int | AutoscalingConfig,
    actor_options: Mapping[str, Any],
    drain_timeout_s: float,
    arguments: tuple[Any, ...],
    **more: Any,
) -> Application:
    deployment = serve.deployment(
        name=name,
        num_replicas=number if isinstance(number, int) else None,
        autoscaling_config=None if isinstance(number, int) else number,
        ray_actor_options=dict(actor_options),
        max_ongoing_requests=UNLIMITED,
        graceful_shutdown_timeout_s=drain_timeout_s,
        health_check_period_s=5.0,
        health_check_timeout_s=30.0,
        **more,
    )(cls)
    app: Application = deployment.bind(*arguments)
    return app
