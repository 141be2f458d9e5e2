"""Ray and Serve on the given port, on which applications come and go: PORT SOCKET.

A message on the socket is the name of one of Hosted's methods and its arguments; an answer says it is done.
"""

import sys
from multiprocessing.connection import Listener

from ray import serve
from ray.cluster_utils import Cluster

from cluster.app import deploy
from cluster.config import ClusterConfig

CPUS_A_NODE = 2


class Hosted:
    def __init__(self, port: int):
        self._nodes = Cluster(
            initialize_head=True, head_node_args={"num_cpus": CPUS_A_NODE, "include_dashboard": False}
        )
        self._nodes.connect(namespace="serve")
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})

    def serve(self, *arguments: str) -> None:
        """Deletes what is served and deploys by `key=value` of ClusterConfig; it has yet to become ready."""
        for name in serve.status().applications:
            serve.delete(name)
        config = ClusterConfig.model_validate(dict(argument.split("=", 1) for argument in arguments))
        target = serve.RunTarget(deploy(config), name=config.app, route_prefix="/")
        serve.run_many([target], wait_for_applications_running=False)

    def add_node(self) -> None:
        self._added = self._nodes.add_node(num_cpus=CPUS_A_NODE)

    def lose_node(self) -> None:
        """Kills the added node, as a machine that fails."""
        self._nodes.remove_node(self._added, allow_graceful=False)


def main() -> None:
    port, address = sys.argv[1:]
    hosted = Hosted(int(port))
    with Listener(address, "AF_UNIX") as listener, listener.accept() as tests:
        while True:
            name, *arguments = tests.recv()
            getattr(hosted, name)(*arguments)
            tests.send("done")


if __name__ == "__main__":
    main()
