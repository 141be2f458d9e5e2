"""The short way past Serve: which requests take it, and that Serve still asks for the middleware."""

import json
from typing import Any

import httpx
import pytest
from ray.serve._private import constants, http_util
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.environment import serving_environment
from router.api import create_app
from router.direct import DirectDoor, HasDirectApp
from router.ingress import Ingress
from router.paths import COMPLETIONS, DIRECT
from tests.router.conftest import over_http
from tests.router.faults import PATH, chat
from tests.router.stack import a_stack

CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"


class Noting:
    """An app that notes whom it was asked by."""

    def __init__(self) -> None:
        self.asked: list[Scope] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.asked.append(scope)


class Layer:
    """Middleware that notes what is sent through it."""

    def __init__(self, app: ASGIApp):
        self._app = app
        self.sent: list[Message] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def note(message: Message) -> None:
            self.sent.append(message)
            await send(message)

        await self._app(scope, receive, note if scope["type"] == "http" else send)


class Deployment:
    """What Serve would have made of the ingress."""

    def __init__(self, app: ASGIApp | None):
        self.app = app

    def direct_app(self) -> ASGIApp | None:
        return self.app


async def nothing(*_: Any) -> Any:
    raise AssertionError("nothing is to be read or sent")


async def ask(door: ASGIApp, path: str, type_: str = "http") -> None:
    await door({"type": type_, "path": path}, nothing, nothing)


@pytest.fixture
def in_replica(monkeypatch: pytest.MonkeyPatch):
    """Makes this process look as a replica of Serve's does that has this deployment."""

    def become(deployment: object) -> None:
        class Context:
            servable_object = deployment

        monkeypatch.setattr("ray.serve.api._get_internal_replica_context", Context)

    return become


async def test_completions_go_to_the_app_and_all_else_to_serve(in_replica) -> None:
    own, serves = Noting(), Noting()
    in_replica(Deployment(own))
    door = DirectDoor(serves)
    for path in sorted(COMPLETIONS):
        await ask(door, path)
    others = ["/-/healthz", "/-/routes", "/v1/models", "/app/v1/chat/completions"]
    for path in others:
        await ask(door, path)
    await ask(door, "/v1/chat/completions", "websocket")
    assert [scope["path"] for scope in own.asked] == sorted(COMPLETIONS)
    assert all(scope[DIRECT] for scope in own.asked)
    assert [scope["path"] for scope in serves.asked] == [*others, "/v1/chat/completions"]
    assert not any(DIRECT in scope for scope in serves.asked)


async def test_where_no_app_is_to_be_had_serve_answers_and_later_the_app(in_replica) -> None:
    own, serves = Noting(), Noting()
    door = DirectDoor(serves)
    await ask(door, "/v1/completions")  # no replica of Serve's
    for deployment in (None, object(), Deployment(None)):
        in_replica(deployment)
        await ask(door, "/v1/completions")
    assert (len(own.asked), len(serves.asked)) == (0, 4)
    in_replica(Deployment(own))
    await ask(door, "/v1/completions")
    assert (len(own.asked), len(serves.asked)) == (1, 4)


async def test_the_parts_of_a_stream_go_past_the_layers_and_arrive_the_same(in_replica) -> None:
    asked = chat(stream=True, max_tokens=200, decoding={"mode": "ar"})
    async with a_stack() as stack:
        layer = Layer(create_app(stack.door))
        in_replica(Deployment(layer))
        texts, sent = [], []
        for served in (layer, DirectDoor(layer)):
            layer.sent.clear()
            async with (
                over_http(served) as url,
                httpx.AsyncClient(base_url=url, timeout=60.0) as client,
                client.stream("POST", PATH, json=asked) as response,
            ):
                lines = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
            assert lines[-1] == "[DONE]"
            chunks = [json.loads(line)["choices"][0]["delta"] for line in lines[:-1]]
            texts.append("".join(chunk.get("content") or "" for chunk in chunks))
            sent.append([message["type"] for message in layer.sent])
        assert texts[0] == texts[1] != ""
        assert len(sent[0]) > 2
        assert sent[1] == ["http.response.start", "http.response.body"]


def test_serve_takes_the_middleware_from_where_the_environment_says(tmp_path) -> None:
    """Without this completions go Serve's way, which is right and slow."""
    named = serving_environment(tmp_path)[CALLBACK]
    found = http_util.validate_http_proxy_callback_return(http_util.call_function_from_import_path(named))
    assert [each.cls for each in found] == [DirectDoor]
    assert issubclass(Ingress, HasDirectApp)


def test_serve_still_reads_the_variables() -> None:
    assert hasattr(constants, CALLBACK)
    assert hasattr(constants, "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD")
