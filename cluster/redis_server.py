"""The Serve deployment of the embedded Redis, apart from the application: its process imports little else."""

from cluster.embedded_redis import EmbeddedRedis, Endpoint


class RedisServer:
    """Owns the embedded Redis for as long as the application runs, wherever it was deployed from.

    deploy() draws the endpoint, so that everyone is told the same one, and it stays the same when
    Serve restarts this actor.
    """

    def __init__(self, endpoint: Endpoint):
        self._server = EmbeddedRedis.start(endpoint)

    def __del__(self) -> None:
        self._server.stop()
