"""Ray's own HAProxy, run by Ray's own code, with our additions: who sends half a request, and who goes."""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from ray.serve._private import haproxy as rays
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions
from starlette.types import Receive, Scope, Send

from benchmarks.processes import free_port, short_folder
from cluster.haproxy import BINARY_VARIABLE, TIMEOUT_VARIABLE, amended, ours
from tests.eventually import eventually
from tests.router.conftest import over_http

WRAPPER = Path(__file__).parents[2] / "cluster" / "haproxy.sh"
TIMEOUT_S = 1
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
WHOLE = POST + b"Content-Length: 2\r\n\r\n{}"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000")
HALF_SENT = {
    "nothing": b"",
    "half a request line": b"POST /v1/chat",
    "half the headers": POST + b"X-Half: ",
    "no body": POST + b"Content-Length: 500\r\n\r\n",
    "half a body": POST + b'Content-Length: 500\r\n\r\n{"model": "t',
    "a chunked body without an end": POST + b'Transfer-Encoding: chunked\r\n\r\n8\r\n{"model"\r\n',
}
HALF_SENT_HTTP2 = {
    "no request": PREFACE,
    "half a frame of headers": PREFACE + bytes.fromhex("000040010400000001") + b"\x82",
}


class Ingress:
    """In an ingress's place: a stream without end, and an answer that waits until its client has gone."""

    def __init__(self) -> None:
        self.num_waiting = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
        elif scope["path"] == "/v1/chat/completions":
            while (await receive()).get("more_body"):
                pass
            self.num_waiting += 1
            while (await receive())["type"] != "http.disconnect":
                pass
            self.num_waiting -= 1
        else:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            while scope["path"] == "/stream":
                await send({"type": "http.response.body", "body": b"data: x\n\n", "more_body": True})
                with suppress(TimeoutError):
                    async with asyncio.timeout(0.02):
                        if (await receive())["type"] == "http.disconnect":
                            break
            await send({"type": "http.response.body", "body": b"ok"})


class HAProxy:
    def __init__(self, api: HAProxyApi, port: int, ingress: Ingress):
        self.api = api
        self.ingress = ingress
        self._port = port

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            yield reader, writer
        finally:
            writer.close()

    @asynccontextmanager
    async def sent(self, data: bytes) -> AsyncIterator[asyncio.StreamReader]:
        async with self.opened() as (reader, writer):
            writer.write(data)
            await writer.drain()
            yield reader


@pytest.fixture
def wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """As cluster.environment sets it where Ray starts."""
    monkeypatch.setattr(rays, BINARY_VARIABLE, str(WRAPPER))
    monkeypatch.setenv(BINARY_VARIABLE, str(WRAPPER))
    monkeypatch.setenv("TRIAD_PYTHON", sys.executable)
    monkeypatch.setenv(TIMEOUT_VARIABLE, str(TIMEOUT_S))


def of_ray(ingress_port: int, port: int) -> HAProxyApi:
    folder = short_folder()
    config = HAProxyConfig(
        socket_path=str(folder / "admin.sock"),
        metrics_socket_path=str(folder / "metrics.sock"),
        server_state_base=str(folder),
        server_state_file=str(folder / "state"),
        stats_port=free_port(),
        metrics_port=free_port(),
        nbthread=1,
        has_received_routes=True,
        has_received_servers=True,
        is_head=True,
        http_options=HTTPOptions(host="127.0.0.1", port=port),
    )
    server = ServerConfig(name="one", host="127.0.0.1", port=ingress_port)
    backend = BackendConfig(name="app", path_prefix="/", app_name="app", servers=[server])
    return HAProxyApi(config, {"app": backend}, str(folder / "haproxy.cfg"))


@pytest.fixture
async def haproxy(wrapped: None) -> AsyncIterator[HAProxy]:
    ingress = Ingress()
    async with over_http(ingress) as url:  # type: ignore[arg-type]
        port = free_port()
        api = of_ray(int(url.rpartition(":")[2]), port)
        await api.start()
        try:
            yield HAProxy(api, port, ingress)
        finally:
            await api.stop()


async def ended_after_s(haproxy: HAProxy, data: bytes) -> tuple[float, bytes]:
    """How long a connection lasts on which this was sent, and what came back."""
    began_s = time.monotonic()
    async with haproxy.sent(data) as reader, asyncio.timeout(20):
        answer = await reader.read()
    return time.monotonic() - began_s, answer


async def test_half_a_request_is_ended_with_a_408_while_streams_go_on_and_after_a_reload(
    haproxy: HAProxy,
) -> None:
    async with haproxy.sent(b"GET /stream HTTP/1.1\r\nHost: a\r\n\r\n") as stream:
        await stream.readuntil(b"data: x")
        for _ in range(2):
            found = await asyncio.gather(*(ended_after_s(haproxy, data) for data in HALF_SENT.values()))
            for name, (seconds, answer) in zip(HALF_SENT, found, strict=True):
                assert TIMEOUT_S / 2 < seconds < 3 * TIMEOUT_S, name
                head, _, body = answer.partition(b"\r\n\r\n")
                assert b" 408 " in head.splitlines()[0], (name, answer)
                if b"\r\n\r\n" in HALF_SENT[name]:  # else HAProxy does not yet know what it is
                    assert json.loads(body)["error"]["code"] == "request_timeout"
            http2 = await asyncio.gather(*(ended_after_s(haproxy, d) for d in HALF_SENT_HTTP2.values()))
            assert all(seconds < 3 * TIMEOUT_S for seconds, _ in http2), http2
            await haproxy.api.reload()
        assert await stream.readuntil(b"data: x")
    assert haproxy.ingress.num_waiting == 0


async def test_a_whole_request_may_wait_for_its_answer_as_long_as_it_takes(haproxy: HAProxy) -> None:
    async with haproxy.sent(WHOLE) as reader:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2.5 * TIMEOUT_S):
                await reader.read()
        assert haproxy.ingress.num_waiting == 1


@pytest.mark.parametrize("size", [2, 100_000])
async def test_a_client_that_goes_is_noticed_though_its_body_came_apart(haproxy: HAProxy, size: int) -> None:
    head = POST + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % size
    async with haproxy.opened() as (reader, writer):
        writer.write(head)
        await reader.readuntil(b" 100 Continue\r\n\r\n")  # so HAProxy has read the head by itself
        writer.write(b"x" * size)
        await eventually(lambda: haproxy.ingress.num_waiting == 1)
    await eventually(lambda: haproxy.ingress.num_waiting == 0, within_s=2.0)


def checked(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([WRAPPER, "-c", "-f", path], capture_output=True, text=True, check=False)


@pytest.mark.usefixtures("wrapped")
def test_haproxy_takes_what_ray_renders_with_our_lines_which_are_there_once() -> None:
    api = of_ray(1, free_port())
    api._generate_config_file_internal()
    path = Path(api.config_file_path)
    for _ in range(2):
        done = checked(path)
        assert done.returncode == 0, done.stderr
        lines = [line.strip() for line in path.read_text().splitlines()]
        assert [lines.count(line) for line in ours(TIMEOUT_S)] == [1] * len(ours(TIMEOUT_S))
    assert [found.name for found in path.parent.iterdir() if found.name.startswith("haproxy.cfg.")] == [
        "haproxy.cfg.lock"
    ]


def test_our_lines_come_after_rays_in_its_section() -> None:
    text = "global\n    a\ndefaults\n    option splice-request\n# a note\n    b\nfrontend f\n    bind :1\n"
    lines = [line.strip() for line in amended(text).splitlines()]
    assert lines.index("b") < lines.index("no option splice-request") < lines.index("frontend f")
    assert amended(amended(text)) == amended(text)


@pytest.mark.parametrize("text", ["global\n    a\n", "defaults\n    a\ndefaults\n    b\n"])
def test_another_template_of_rays_is_an_error_and_not_passed_over(text: str) -> None:
    with pytest.raises(ValueError, match="sections `defaults` where one is expected"):
        amended(text)


@pytest.mark.usefixtures("wrapped")
@pytest.mark.parametrize("given", ["0", "-1", "ten", "1.5", "3601"])
def test_a_timeout_that_is_none_is_told(given: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(TIMEOUT_VARIABLE, given)
    (tmp_path / "haproxy.cfg").write_text("defaults\n")
    done = checked(tmp_path / "haproxy.cfg")
    assert done.returncode != 0
    assert TIMEOUT_VARIABLE in done.stderr
