"""One server, Sentinels and a Cluster, of real Valkey processes."""

import socket
import subprocess
from contextlib import contextmanager

import pytest
import redis
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.connection import SSLConnection
from redis.asyncio.sentinel import SentinelConnectionPool

from cluster.embedded_redis import find_server
from policies.connection import check_url, connect
from policies.modes import DecodePlan, Mode
from policies.plan import DecisionRecord, ReplicaPlan
from policies.store import LoadStore, PlanWrite, StoreUnavailable
from tests.policies.helpers import a_load, eventually

LIMITS = {"connect_timeout_s": 0.5, "command_timeout_s": 0.5}


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://host", "start it with one of redis:"),
        ("redis+sentinel://host:26379", "name the master"),
        ("redis+sentinel:///mymaster", "no host:port"),
        ("redis+sentinel://host/mymaster/two", "a number, not 'two'"),
        ("redis+cluster://host:7000/0", "no databases"),
        ("redis+cluster://host:port", "[Pp]ort"),
        ("redis+cluster://host?socket_timeout=soon", "socket_timeout"),
    ],
)
def test_a_wrong_url_says_what_to_change(url, words):
    with pytest.raises(ValueError, match=words):
        check_url(url)


def test_tls_and_credentials_reach_every_kind_of_client():
    query = "?ssl_ca_certs=/ca.pem&ssl_check_hostname=false"
    single = connect(f"rediss://me:secret@host:1/2{query}", **LIMITS)
    cluster = connect(f"rediss+cluster://me:secret@one:1,two:2{query}", **LIMITS)
    url = f"rediss+sentinel://me:secret@one:1,two/main/2{query}&sentinel_password=other"
    sentinel = connect(url, **LIMITS)
    assert isinstance(single, Redis)
    assert isinstance(cluster, RedisCluster)
    pool = sentinel.connection_pool
    assert isinstance(pool, SentinelConnectionPool)
    assert single.connection_pool.connection_class is SSLConnection
    for options in (
        single.connection_pool.connection_kwargs,
        cluster.connection_kwargs,
        pool.connection_kwargs,
    ):
        assert (options["username"], options["password"]) == ("me", "secret")
        assert options["ssl_ca_certs"] == "/ca.pem"
        assert options["socket_timeout"] == 0.5
    assert pool.connection_kwargs["db"] == single.connection_pool.connection_kwargs["db"] == 2
    assert pool.service_name == "main"
    (first, second) = pool.sentinel_manager.sentinels
    assert second.connection_pool.connection_kwargs["port"] == 26379
    assert first.connection_pool.connection_kwargs["password"] == "other"
    assert first.connection_pool.connection_kwargs["ssl_ca_certs"] == "/ca.pem"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def valkey(folder, *arguments):
    """A server of this folder's; `arguments` as on its command line."""
    folder.mkdir(exist_ok=True)
    process = subprocess.Popen(
        [find_server(), *arguments], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def answers(port, **options):
    client = redis.asyncio.Redis(host="127.0.0.1", port=port, decode_responses=True, **options)

    async def ping():
        try:
            return await client.ping()
        except redis.RedisError:
            return False

    await eventually(ping, bool, timeout_s=20.0)
    return client


async def use(store):
    """Every kind of command the store has."""
    assert await store.publish_and_read(a_load(1)) is None
    lease = await store.acquire_lease("a")
    plan = ReplicaPlan(1, DecodePlan(Mode.AR), "rule", "reason")
    record = DecisionRecord(plan, a_load(1), True, "a")
    assert await store.renew_lease(lease)
    assert await store.commit(lease, {"r1": PlanWrite(plan)}, ["r1"], [record])
    assert (await store.publish_and_read(a_load(1))).plan == plan
    view = await store.read_view()
    assert (view.leader, list(view.plans)) == ("a", ["r1"])
    assert [seen.plan for seen in await store.recent_decisions()] == [plan]
    await store.withdraw("r1")
    await store.release_lease(lease)


async def test_a_cluster(tmp_path, app):
    port = free_port()
    arguments = ["--port", str(port), "--cluster-enabled", "yes", "--cluster-port", str(free_port())]
    with valkey(tmp_path / "node", *arguments, "--requirepass", "secret", "--save", ""):
        node = await answers(port, password="secret")
        await node.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
        await eventually(lambda: node.cluster("INFO"), lambda info: info["cluster_state"] == "ok", 20.0)
        store = LoadStore(f"redis+cluster://:secret@127.0.0.1:{port}", app)
        await use(store)
        await store.close()
        await node.aclose()


async def test_a_sentinels_master_and_the_one_after_it(tmp_path, app):
    """The master is killed: the store is unavailable, and then again at work on its successor."""
    ports = {name: free_port() for name in ("first", "second", "sentinel")}
    plain = ["--save", "", "--repl-diskless-sync-delay", "0"]
    second = ["--replicaof", "127.0.0.1", str(ports["first"])]
    config = tmp_path / "sentinel.conf"
    config.write_text(
        f"port {ports['sentinel']}\nsentinel monitor main 127.0.0.1 {ports['first']} 1\n"
        "sentinel down-after-milliseconds main 500\nsentinel failover-timeout main 2000\n"
    )
    with (
        valkey(tmp_path / "one", "--port", str(ports["first"]), *plain) as master,
        valkey(tmp_path / "two", "--port", str(ports["second"]), *plain, *second),
        valkey(tmp_path / "three", str(config), "--sentinel"),
    ):
        for port in ports.values():
            await (await answers(port)).aclose()
        sentinel = await answers(ports["sentinel"])

        async def num_followers():
            masters = await sentinel.sentinel_masters()
            return masters["main"]["num-slaves"]

        await eventually(num_followers, lambda num: num == 1, 30.0)
        store = LoadStore(f"redis+sentinel://127.0.0.1:{ports['sentinel']}/main", app)
        await use(store)
        master.kill()
        with pytest.raises(StoreUnavailable):
            await store.read_loads()

        async def publish():
            try:
                await store.publish_and_read(a_load(3))
            except StoreUnavailable:
                return False
            return True

        await eventually(publish, bool, 30.0)
        (seen,) = (await store.read_loads()).replicas
        assert seen.load == a_load(3)
        await store.close()
        await sentinel.aclose()
