"""Makes the Redis client for a redis_url: of one server, of a Sentinel's master, or of a Cluster.

    redis://[user:password@]host:port/db                       rediss:// for TLS, unix:// for a socket
    redis+sentinel://[user:password@]host:port,host:port/service[/db]
    redis+cluster://[user:password@]host:port,host:port        rediss+... for TLS

The hosts are the Sentinels in the second form, any of the Cluster's nodes in the third. Options follow as
a query, by the client's names: ?ssl_ca_certs=/ca.pem&ssl_certfile=... ; the Sentinels' own user and
password are sentinel_username and sentinel_password.
"""

from typing import Any, TypeAlias
from urllib.parse import parse_qsl, urlencode, urlsplit

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import SSLConnection, parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff

SINGLE = ("redis", "rediss", "unix")
SENTINEL = ("redis+sentinel", "rediss+sentinel")
CLUSTER = ("redis+cluster", "rediss+cluster")
SCHEMES = tuple(f"{scheme}://" for scheme in (*SINGLE, *SENTINEL, *CLUSTER))

DEFAULT_PORT = 6379
"""The port of a server or a Cluster's node where the URL names none."""
DEFAULT_SENTINEL_PORT = 26379
"""The port of a Sentinel where the URL names none."""

Client: TypeAlias = "Redis | RedisCluster"


def check_url(url: str) -> None:
    """Checks that `connect` can make a client of a URL; raises ValueError that says what to change."""
    scheme = urlsplit(url).scheme
    if scheme not in (*SINGLE, *SENTINEL, *CLUSTER):
        raise ValueError(f"start it with one of {', '.join(SCHEMES)}, as in redis://host:6379/0")
    if scheme in SINGLE:
        parse_url(url)
        return
    _hosts(url, DEFAULT_PORT)
    _options(url)
    if scheme in SENTINEL and not _path(url)[0]:
        raise ValueError("name the master that the Sentinels watch: redis+sentinel://host:26379/mymaster")
    if scheme in CLUSTER and any(_path(url)):
        raise ValueError("a Cluster has no databases to choose from: leave out what follows the hosts")


def connect(url: str, *, connect_timeout_s: float, command_timeout_s: float) -> Client:
    """Makes a client that opens its connections as they are needed. Raises ValueError as check_url does."""
    check_url(url)
    limits: dict[str, Any] = {
        "socket_connect_timeout": connect_timeout_s,
        "socket_timeout": command_timeout_s,
    }
    common: dict[str, Any] = {"decode_responses": True, "encoding_errors": "replace", **limits}
    scheme = urlsplit(url).scheme
    if scheme in SINGLE:
        return Redis.from_url(url, retry=Retry(NoBackoff(), 0), **common)
    options = _options(url)
    if scheme in CLUSTER:
        nodes = [ClusterNode(*address) for address in _hosts(url, DEFAULT_PORT)]
        return RedisCluster(startup_nodes=nodes, retry=Retry(NoBackoff(), 3), **common, **options)
    own = {
        name: options.pop(f"sentinel_{name}")
        for name in ("username", "password")
        if f"sentinel_{name}" in options
    }
    service, database = _path(url)
    sentinel = Sentinel(  # type: ignore[no-untyped-call]
        _hosts(url, DEFAULT_SENTINEL_PORT),
        sentinel_kwargs={**limits, **own, **{k: v for k, v in options.items() if k.startswith("ssl")}},
    )
    master: Redis = sentinel.master_for(
        service, db=int(database or 0), retry=Retry(NoBackoff(), 0), **common, **options
    )
    return master


def _hosts(url: str, default_port: int) -> list[tuple[str, int]]:
    addresses = urlsplit(url).netloc.rpartition("@")[2].split(",")
    found = []
    for address in addresses:
        parts = urlsplit(f"//{address}")
        if not parts.hostname:
            raise ValueError(f"{address!r} is no host:port")
        found.append((parts.hostname, parts.port or default_port))
    return found


def _path(url: str) -> tuple[str, str]:
    """Returns the service and the database that a URL names, each empty where it is not given."""
    service, _, database = urlsplit(url).path.strip("/").partition("/")
    if database and not database.isdigit():
        raise ValueError(f"the database is a number, not {database!r}")
    return service, database


def _options(url: str) -> dict[str, Any]:
    """Returns the user, password, TLS and query of a URL as the client's keyword arguments."""
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query))
    own = {name: query.pop(name) for name in list(query) if name.startswith("sentinel_")}
    credentials = parts.netloc.rpartition("@")[0]
    host = f"{credentials}@host" if credentials else "host"
    scheme = "rediss" if parts.scheme.startswith("rediss") else "redis"
    options: dict[str, Any] = dict(parse_url(f"{scheme}://{host}/?{urlencode(query)}"))
    del options["host"]
    if options.pop("connection_class", None) is SSLConnection:
        options["ssl"] = True
    return options | own
