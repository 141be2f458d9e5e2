"""Two Ray nodes on this machine with a replica each, on the given port; SIGUSR1 kills the second node.

The first has room for two ingresses and one replica, so the other replica waits for the second node.
"""

import signal
import sys
import time
from collections.abc import Callable

from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.schema import ReplicaState

from cluster.app import deploy
from cluster.config import ClusterConfig

CPUS_A_NODE = 1
CPUS_A_REPLICA = 0.7


def num_running(deployment: str) -> int:
    for application in serve.status().applications.values():
        if deployment in application.deployments:
            return application.deployments[deployment].replica_states.get(ReplicaState.RUNNING, 0)
    return 0


def wait_for(is_so: Callable[[], bool]) -> None:
    while not is_so():
        time.sleep(0.2)


def main() -> None:
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": CPUS_A_NODE, "include_dashboard": False}
    )
    cluster.connect(namespace="serve")
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    config = ClusterConfig(
        num_replicas=2,
        num_ingresses=2,
        replica_cpus=CPUS_A_REPLICA,
        num_threads=1,
        calibration_s=0.2,
        policy="ar",
    )
    target = serve.RunTarget(deploy(config), name="triad", route_prefix="/")
    serve.run_many([target], wait_for_applications_running=False)
    wait_for(lambda: num_running("Replica") == num_running("Redis") == 1 and num_running("Ingress") == 2)
    second = cluster.add_node(num_cpus=CPUS_A_NODE)
    wait_for(lambda: num_running("Replica") == 2)
    signal.signal(signal.SIGUSR1, lambda *_: cluster.remove_node(second, allow_graceful=False))
    try:
        while True:
            time.sleep(1)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
