"""`serve run cluster.app:deploy`: the builder of the whole application."""

# No `from __future__ import annotations` here: Serve reads the annotation of deploy()'s parameter,
# and as a string it would leave the configuration an unchecked dict.

from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.schema import LoggingConfig

from cluster.autoscaling import autoscaling_config
from cluster.config import ClusterConfig
from cluster.embedded_redis import EmbeddedRedis, Endpoint
from policies.scaling import Targets
from replicas.config import ReplicaConfig
from router.admission_control import QueueLimits
from router.config import AccessConfig, Bounds
from router.ingress import AddressedRouter, Ingress, IngressConfig

UNLIMITED = 100_000
"""The ongoing requests an actor may have. Admission and the replica's queue are the bounds; Serve's own would
hold back cancels and channels along with requests."""

ADDRESSED_ROUTER = f"{AddressedRouter.__module__}:{AddressedRouter.__name__}"


class RedisServer:
    """Owns the embedded Redis for as long as the application runs, wherever it was deployed from.

    deploy() draws the endpoint, so that everyone is told the same one, and it stays the same when
    Serve restarts this actor.
    """

    def __init__(self, endpoint: Endpoint):
        self._server = EmbeddedRedis.start(endpoint)

    def __del__(self) -> None:
        self._server.stop()


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
        {"num_cpus": args.ingress_cpus},
        args.drain_timeout_s,
        (_ingress_config(args, redis_url), _replicas(args, redis_url), deployed_with),
        logging_config=_logging(args, access_log=args.log_format == "text"),
    )


def _redis_server(endpoint: Endpoint) -> Application:
    return _bind("Redis", RedisServer, 1, {"num_cpus": 0}, 10.0, (endpoint,))


def _replicas(args: ClusterConfig, redis_url: str) -> Application:
    # Late, because it brings torch, which nothing else here needs.
    from replicas.server import Replica

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
            min_replicas=args.least_replicas,
            initial_replicas=args.first_replicas,
            max_replicas=args.max_replicas,
            upscale_delay_s=args.upscale_delay_s,
            downscale_delay_s=args.downscale_delay_s,
        )
    return _bind(
        "Replica",
        Replica,
        number,
        {"num_cpus": args.replica_cpus, "num_gpus": args.num_gpus},
        args.drain_timeout_s,
        (_replica_config(args, redis_url),),
        # The ingress asks each replica every second who it is; its own log has the requests.
        logging_config=_logging(args, access_log=False),
        request_router_config=RequestRouterConfig.model_validate({"request_router_class": ADDRESSED_ROUTER}),
        **parallel,
    )


def _logging(args: ClusterConfig, access_log: bool) -> LoggingConfig:
    encoding = "JSON" if args.log_format == "json" else "TEXT"
    return LoggingConfig.model_validate({"encoding": encoding, "enable_access_log": access_log})


def _bind(
    name: str,
    cls: type,
    number: int | AutoscalingConfig,
    actor_options: Mapping[str, float],
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


def _ingress_config(args: ClusterConfig, redis_url: str) -> IngressConfig:
    return IngressConfig(
        app=args.app,
        model_name=args.model_name,
        redis_url=redis_url,
        policy=args.policy,
        policy_params=args.policy_params,
        max_running=args.max_running,
        queue_limits=QueueLimits(args.max_waiting, args.max_waiting_tokens, args.max_queue_s),
        bounds=Bounds(
            max_body_bytes=args.max_body_bytes,
            body_timeout_s=args.body_timeout_s,
            max_header_bytes=args.max_header_bytes,
            max_json_depth=args.max_json_depth,
            max_prompt_chars=args.max_prompt_chars,
        ),
        access=AccessConfig(
            api_keys_file=args.api_keys_file,
            limits_without_redis=args.limits_without_redis,
            limits_timeout_s=args.limits_timeout_s,
            cors_origins=args.cors_origins,
        ),
        stream_interval_s=args.stream_interval_ms / 1000.0,
        shared_prefix_cache=args.shared_prefix_cache,
        log_format=args.log_format,
    )


def _replica_config(args: ClusterConfig, redis_url: str) -> ReplicaConfig:
    return ReplicaConfig(
        checkpoint=args.checkpoint,
        served_model_name=args.model_name,
        app=args.app,
        redis_url=redis_url,
        policy=args.policy,
        policy_params=args.policy_params,
        device="cuda" if args.num_gpus > 0 else "cpu",
        dtype=args.weights_dtype,
        quantization=args.quantization,
        forward=args.forward,
        num_threads=args.num_threads,
        # All on one machine is the case to be right for.
        num_sharing=args.most_replicas * args.tensor_parallel,
        page_size=args.page_size,
        kv_cache_mb=args.kv_cache_mb,
        kv_dtype=args.kv_dtype,
        tensor_parallel=args.tensor_parallel,
        max_running=args.max_running,
        max_step_tokens=args.max_step_tokens,
        max_prefill_tokens=args.max_prefill_tokens,
        max_step_ms=args.max_step_ms,
        overlap_blocks=args.overlap_blocks,
        max_waiting=args.max_waiting,
        calibration_s=args.calibration_s,
        log_format=args.log_format,
        tool_parser=args.tool_parser,
        reasoning_parser=args.reasoning_parser,
        targets=Targets(args.target_ttft_s, args.target_tpot_s),
    )
