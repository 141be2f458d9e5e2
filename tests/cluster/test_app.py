import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from ray import cloudpickle
from ray.serve import Application
from ray.serve.schema import ServeDeploySchema

import cluster.app
from cluster.app import deploy
from cluster.config import ClusterConfig
from cluster.embedded_redis import EmbeddedRedis, Endpoint
from cluster.redis_server import RedisServer
from policies.scaling import Targets
from replicas.config import ReplicaConfig
from router.config import IngressConfig


def nodes(app: Application) -> dict[str, Application]:
    """The application's deployments by name, found as Serve finds them: among the arguments."""
    found = {app._bound_deployment.name: app}
    for argument in app._bound_deployment.init_args:
        for inner in argument if isinstance(argument, tuple) else (argument,):
            if isinstance(inner, Application):
                found |= nodes(inner)
    return found


def argument(app: Application, position: int = 0) -> Any:
    return app._bound_deployment.init_args[position]


def test_without_a_redis_url_one_is_deployed_that_all_know():
    found = nodes(deploy(ClusterConfig(num_replicas=2)))
    assert set(found) == {"Ingress", "Replica", "Redis"}
    endpoint = argument(found["Redis"])
    assert isinstance(endpoint, Endpoint)
    ingress, replica = argument(found["Ingress"]), argument(found["Replica"])
    assert isinstance(ingress, IngressConfig)
    assert isinstance(replica, ReplicaConfig)
    assert argument(found["Ingress"], 1) == argument(found["Replica"], 1) == endpoint.url
    assert (ingress.app, ingress.model_name) == (replica.app, replica.model_name)


def test_with_a_redis_url_none_is_deployed():
    url = "redis://:password@redis.example:6379/3"
    found = nodes(deploy(ClusterConfig(redis_url=url)))
    assert set(found) == {"Ingress", "Replica"}
    assert argument(found["Ingress"], 1) == argument(found["Replica"], 1) == url


def test_what_is_configured_arrives():
    config = ClusterConfig(
        num_replicas=3,
        num_ingresses=2,
        model="some/model",
        policy="ar",
        dtype="bfloat16",
        forward="torch",
        num_threads=4,
        page_size=32,
        kv_cache_mb=99,
        max_running=5,
        max_step_tokens=256,
        max_waiting=6,
        max_waiting_tokens=700,
        max_queue_s=8.0,
        shared_prefix_cache=True,
        tool_parser="mistral",
        reasoning_parser="think",
        max_body_bytes=5000,
        num_gpus=1,
        drain_timeout_s=77,
    )
    found = nodes(deploy(config))
    replica = found["Replica"]._bound_deployment
    assert replica.num_replicas == 3
    assert replica.ray_actor_options == {"num_cpus": 0.1, "num_gpus": 1.0}
    assert replica._deployment_config.graceful_shutdown_timeout_s == 77
    assert found["Ingress"]._bound_deployment.num_replicas == 2
    given = argument(found["Replica"])
    assert (given.checkpoint, given.policy, given.weights_dtype, given.num_threads) == (
        "some/model",
        "ar",
        "bfloat16",
        4,
    )
    assert given.forward == "torch"
    assert (given.tool_parser, given.reasoning_parser) == ("mistral", "think")
    assert (given.page_size, given.kv_cache_mb, given.max_running) == (32, 99, 5)
    assert (given.max_step_tokens, given.max_waiting) == (256, 6)
    ingress = argument(found["Ingress"])
    assert ingress.shared_prefix_cache
    assert (ingress.max_running, ingress.max_waiting, ingress.max_body_bytes) == (5, 6, 5000)
    assert (ingress.max_waiting_tokens, ingress.max_queue_s) == (700, 8.0)


def test_the_number_of_replicas_may_follow_the_demand():
    config = ClusterConfig(
        min_replicas=1,
        num_replicas=2,
        max_replicas=4,
        downscale_delay_s=7,
        target_ttft_s=3,
        target_tpot_s=0.1,
    )
    found = nodes(deploy(config))
    scaling = found["Replica"]._bound_deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.initial_replicas, scaling.max_replicas) == (1, 2, 4)
    assert (scaling.upscale_delay_s, scaling.downscale_delay_s) == (5.0, 7.0)
    assert argument(found["Replica"]).targets == Targets(3.0, 0.1)
    assert argument(found["Replica"]).num_sharing == 4  # room for all there may be
    assert found["Ingress"]._bound_deployment._deployment_config.autoscaling_config is None
    assert (
        nodes(deploy(ClusterConfig()))["Replica"]._bound_deployment._deployment_config.autoscaling_config
        is None
    )


def test_a_split_replica_has_a_bundle_for_each_process_on_one_machine():
    replica = nodes(deploy(ClusterConfig(num_gpus=1, tensor_parallel=4, kv_dtype="fp8")))["Replica"]
    asked = replica._bound_deployment._replica_config
    assert asked.placement_group_bundles == [{"CPU": 0.1, "GPU": 1.0}] * 4
    assert asked.placement_group_strategy == "STRICT_PACK"
    assert replica._bound_deployment.ray_actor_options == {"num_cpus": 0.1, "num_gpus": 1.0}
    assert (argument(replica).tensor_parallel, argument(replica).kv_dtype) == (4, "fp8")
    on_cpu = nodes(deploy(ClusterConfig(tensor_parallel=2)))["Replica"]._bound_deployment._replica_config
    assert on_cpu.placement_group_bundles == [{"CPU": 0.1}] * 2
    assert (
        nodes(deploy(ClusterConfig()))["Replica"]._bound_deployment._replica_config.placement_group_bundles
        is None
    )


def test_int8_weights_arrive():
    assert argument(nodes(deploy(ClusterConfig()))["Replica"]).quantization is None
    assert argument(nodes(deploy(ClusterConfig(quantization="int8")))["Replica"]).quantization == "int8"


def test_replicas_share_the_cores_of_the_machine_they_are_on():
    """Which this one, where they are deployed from, may not be."""
    for num_replicas, tensor_parallel in ((1, 1), (3, 1), (2, 2)):
        config = ClusterConfig(num_replicas=num_replicas, tensor_parallel=tensor_parallel)
        given = argument(nodes(deploy(config))["Replica"])
        assert (given.num_threads, given.num_sharing) == (None, num_replicas * tensor_parallel)


def test_everything_fits_a_machine_with_two_cores():
    found = nodes(deploy(ClusterConfig(num_replicas=2)))
    cpus = [
        n._bound_deployment.ray_actor_options["num_cpus"] * n._bound_deployment.num_replicas
        for n in found.values()
    ]
    assert sum(cpus) <= 0.5


def test_what_serve_sends_to_actors_can_be_pickled():
    for app in nodes(deploy(ClusterConfig())).values():
        arguments = [a for a in app._bound_deployment.init_args if not isinstance(a, Application | tuple)]
        assert cloudpickle.loads(cloudpickle.dumps(arguments)) == arguments


def test_the_serve_file_is_valid_and_its_keys_are_known():
    path = Path(cluster.app.__file__).with_name("serve.yaml")
    schema = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    (application,) = schema.applications
    assert application.import_path == "cluster.app:deploy"
    assert nodes(deploy(ClusterConfig.model_validate(application.args)))


def test_serve_sees_the_type_of_the_builders_argument():
    assert deploy.__annotations__["args"] is ClusterConfig


def test_building_the_application_needs_no_torch():
    """So a deployment does not wait seconds for what its replicas alone use."""
    code = """
import sys
from cluster.app import deploy
from cluster.config import ClusterConfig
deploy(ClusterConfig())
print(*sorted({"torch", "transformers", "llguidance"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr


def test_serve_run_tells_a_wrong_key_before_it_starts_anything():
    command = [str(Path(sys.executable).with_name("serve")), "run", "cluster.app:deploy", "num_replica=2"]
    root = Path(cluster.app.__file__).parents[1]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=root)
    assert outcome.returncode != 0
    assert "did you mean 'num_replicas'?" in outcome.stderr


def test_the_redis_deployment_runs_its_server_at_the_endpoint():
    endpoint = Endpoint.draw()
    server = RedisServer(endpoint)
    assert isinstance(server._server, EmbeddedRedis)
    assert server._server.url == endpoint.url
    assert server._server.pid is not None
    del server
