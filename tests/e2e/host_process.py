"""Ray and Serve on the given port, on which applications come and go: PORT SOCKET.

Each message on the socket is the `key=value` arguments of a ClusterConfig: what ran is deleted, that is
deployed, and an empty message answers when it runs.
"""

import sys
from multiprocessing.connection import Listener

import ray
from ray import serve

from cluster.app import deploy
from cluster.config import ClusterConfig


def main() -> None:
    port, address = sys.argv[1:]
    ray.init(namespace="serve", include_dashboard=False)
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": int(port)})
    with Listener(address, "AF_UNIX") as listener, listener.accept() as tests:
        while True:
            given = dict(argument.split("=", 1) for argument in tests.recv())
            for name in serve.status().applications:
                serve.delete(name)
            config = ClusterConfig.model_validate(given)
            serve.run(deploy(config), name=config.app, route_prefix="/")
            tests.send(())


if __name__ == "__main__":
    main()
