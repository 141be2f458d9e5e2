"""A small OpenAI-compatible server on loopback, whose faults a request asks for by its own text."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

FAULTS = (
    "429",
    "503",
    "418",
    "error_event",
    "truncated",
    "cut",
    "missing_done",
    "malformed",
    "hang",
    "hang_before",
)
ANSWER = ["One", " two three", " four five six", " seven"]
"""Chunks of 1, 2, 3 and 1 tokens."""


def _chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return f"data: {json.dumps({'choices': [choice], 'usage': None} | more)}\n\n"


async def _events(fault: str | None, gap_s: float) -> AsyncIterator[str]:
    yield _chunk({"role": "assistant", "content": ""})
    for number, text in enumerate(ANSWER):
        if number == 2:
            if fault == "truncated":
                return
            if fault == "cut":
                raise ConnectionResetError("asked for")
            if fault == "hang":
                await asyncio.sleep(3600)
            if fault == "error_event":
                yield 'data: {"error": {"message": "the replica died", "code": "unavailable"}}\n\n'
                return
            if fault == "malformed":
                yield "data: {nonsense\n\n"
                return
        yield _chunk({"content": text})
        await asyncio.sleep(gap_s)
    report = {
        "tokens": {"ar": 1, "self_speculation": 6},
        "forwards": 3,
        "tokens_per_forward": 2.0,
        "switches": 1,
    }
    yield _chunk({}, "stop", decoding=report)
    usage = {"prompt_tokens": 5, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 2}}
    yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n"
    if fault != "missing_done":
        yield "data: [DONE]\n\n"


class OpenAiServer:
    """Keeps what it was asked, and the most requests that ran at once.

    gap_s: between chunks. alters_after: so many requests, the texts are others. api_key: which every
    request must show, whatever it asks for. refused: the paths of those that did not.
    """

    def __init__(
        self,
        gap_s: float = 0.005,
        fault_of_all: str | None = None,
        alters_after: int | None = None,
        api_key: str | None = None,
    ):
        self.refused: list[str] = []
        self.num_states = 0
        self._api_key = api_key
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.running = 0
        self.peak = 0
        self._gap_s = gap_s
        self._fault_of_all = fault_of_all
        self._alters_after = alters_after
        self.url = ""

    async def _completions(self, request: Request) -> Response:
        body = json.loads(await request.body())
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        content = body["messages"][-1]["content"]
        fault = content.removeprefix("fault: ") if content.startswith("fault: ") else self._fault_of_all
        assert fault is None or fault in FAULTS
        if fault == "hang_before":
            await asyncio.sleep(3600)
        if fault is not None and fault.isdigit():
            return JSONResponse({"error": {"message": "as asked for"}}, int(fault))
        altered = self._alters_after is not None and len(self.bodies) > self._alters_after
        return StreamingResponse(self._counted(fault, altered), media_type="text/event-stream")

    async def _counted(self, fault: str | None, altered: bool) -> AsyncIterator[str]:
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            async for event in _events(fault, self._gap_s):
                yield event.replace("seven", "eight") if altered else event
        finally:
            self.running -= 1

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "small", "object": "model"}]})

    async def _state(self, request: Request) -> Response:
        self.num_states += 1
        return JSONResponse({"replicas": [], "decisions": []})

    def _guarded(self, app: ASGIApp) -> ASGIApp:
        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            shown = dict(scope["headers"]).get(b"authorization", b"").decode()
            if self._api_key is None or shown == f"Bearer {self._api_key}":
                await app(scope, receive, send)
            else:
                self.refused.append(scope["path"])
                await JSONResponse({"error": {"message": "no key"}}, 401)(scope, receive, send)

        return guarded

    @contextmanager
    def running_on_loopback(self) -> Iterator[str]:
        routes = [
            Route("/v1/chat/completions", self._completions, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/triad/state", self._state),
        ]
        app = self._guarded(Starlette(routes=routes))
        config = uvicorn.Config(app, port=0, log_level="critical", lifespan="off")
        server = uvicorn.Server(config)
        started = threading.Event()
        ports: list[int] = []

        async def serve() -> None:
            server.config.load()
            server.lifespan = server.config.lifespan_class(server.config)
            await server.startup()
            ports.append(server.servers[0].sockets[0].getsockname()[1])
            started.set()
            with suppress(asyncio.CancelledError):
                await server.main_loop()
            server.force_exit = True  # requests that hang must not hold it
            await server.shutdown()

        thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
        thread.start()
        assert started.wait(20)
        self.url = f"http://127.0.0.1:{ports[0]}"
        try:
            yield self.url
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()
