"""Whatever is sent: an answer in OpenAI's form, no 500, no hang."""

import asyncio
import json
import random
from contextlib import AsyncExitStack
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from router.api import create_app
from tests.router.conftest import in_process
from tests.router.fakes import MODEL
from tests.router.stack import a_stack
from tests.thorough import num_cases

NUM_CASES = num_cases(300)
"""A half by Schemathesis from the OpenAPI document, a half by mutation of valid bodies' bytes."""

pytestmark = pytest.mark.timeout(max(300, NUM_CASES))

ALLOWED = {200, 400, 404, 405, 413, 415, 422, 429, 431, 503, 504}
VALID: list[tuple[str, dict[str, Any]]] = [
    (
        "/v1/chat/completions",
        {
            "model": MODEL,
            "messages": [{"role": "user", "content": 'né \\ud83d " \\\\'}],
            "max_tokens": 4,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0.5,
            "stop": ["a", "\n"],
            "decoding": {"mode": "diffusion", "block_length": 8, "threshold": 0.9},
            "logit_bias": {"5": 1.5},
        },
    ),
    ("/v1/completions", {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 3, "seed": 1}),
    ("/v1/completions", {"model": MODEL, "prompt": "x", "max_tokens": 3, "stream": True}),
]
ODD = [
    "",
    "\x00",
    "\ud800",
    "NaN",
    "1e400",
    "-0",
    "[" * 50,
    "{" * 50,
    '"',
    "\\",
    "null",
    "true",
    "99" * 200,
    "é",
]


class Door:
    """One event loop and one stack for all cases of a test."""

    def __enter__(self) -> "Door":
        self.loop = asyncio.new_event_loop()
        self._exits = AsyncExitStack()
        self.loop.run_until_complete(self._open())
        return self

    async def _open(self) -> None:
        self.stack = await self._exits.enter_async_context(a_stack())
        app = create_app(self.stack.door)
        self.client = await self._exits.enter_async_context(in_process(app))
        self.document = app.openapi()

    def __exit__(self, *error: object) -> None:
        self.loop.run_until_complete(self.stack.settled())
        self.stack.replicas[0].engine.check_integrity()
        self.loop.run_until_complete(self._exits.aclose())
        self.loop.close()

    def send(self, method: str, path: str, **what: Any) -> int:
        request = self.client.build_request(method, path, **what)

        async def ask() -> int:
            async with asyncio.timeout(60):
                response = await self.client.send(request)
            check(response.status_code, response.headers.get("content-type", ""), response.content)
            return response.status_code

        return self.loop.run_until_complete(ask())


def check(status: int, content_type: str, body: bytes) -> None:
    assert status in ALLOWED, (status, body)
    if content_type.startswith("text/event-stream"):
        *events, end = body.decode().split("\n\n")
        assert end == ""
        *pieces, last = events
        assert all(piece.startswith("data: ") for piece in pieces)
        if last != "data: [DONE]":
            assert last.startswith("event: error\ndata: ")
            assert "error" in json.loads(last.removeprefix("event: error\ndata: "))
    elif status != 200:
        answer = json.loads(body)
        error = answer["error"]
        # Anthropic's form, or OpenAI's.
        wanted = (
            {"message", "type"} if answer.get("type") == "error" else {"message", "type", "param", "code"}
        )
        assert set(error) == wanted
        assert error["message"]


def mutated(rng: random.Random) -> tuple[str, bytes]:
    path, body = rng.choice(VALID)
    if rng.random() < 0.5:
        body = dict(body)
        name = rng.choice([*body, "n", "tools", "metadata", "top_p", "timeout_s", "user", "zzz"])
        body[name] = rng.choice([None, True, -1, 0, 1e308, 2**70, "", [], {}, [[]], {"a": [None]}, *ODD])
    raw = bytearray(json.dumps(body).encode())
    for _ in range(rng.choice([0, 0, 1, 2, 5])):
        at = rng.randrange(len(raw) + 1)
        piece = rng.choice(ODD).encode(errors="surrogatepass") if rng.random() < 0.5 else rng.randbytes(2)
        match rng.randrange(3):
            case 0:
                raw[at:at] = piece
            case 1:
                raw[at : at + len(piece)] = piece
            case _:
                del raw[at : at + rng.randrange(8)]
    return path, bytes(raw)


def test_mutated_bodies() -> None:
    rng = random.Random(7)
    statuses = set()
    kinds = ["application/json", "application/json; charset=utf-16", "text/plain", "", "application/x+json"]
    with Door() as door:
        for _ in range(NUM_CASES // 2):
            path, body = mutated(rng)
            kind = rng.choices(kinds, [20, 1, 1, 1, 1])[0]
            statuses.add(door.send("POST", path, content=body, headers={"content-type": kind}))
    assert statuses >= {200, 400}


def test_cases_from_the_openapi_document() -> None:
    statuses: list[int] = []
    with Door() as door:
        schema = schemathesis.openapi.from_dict(door.document)
        operations = [result.ok() for result in schema.get_all_operations()]
        for operation in operations:
            cases = st.one_of(
                operation.as_strategy(),
                operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE),
            )

            @settings(
                max_examples=NUM_CASES // 4 if operation.method == "post" else 20,
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=cases)
            def one(case: schemathesis.Case) -> None:
                request = case.as_transport_kwargs(base_url="http://test")
                request.pop("cookies", None)
                method, url = request.pop("method"), request.pop("url")
                request = {name: value for name, value in request.items() if value is not None}
                if "data" in request:
                    request["content"] = request.pop("data")
                if isinstance(request.get("json"), dict) and request["json"].get("model"):
                    request["json"] = request["json"] | {"model": MODEL}
                try:
                    door.client.build_request(method, url, **request)
                except (UnicodeEncodeError, TypeError, ValueError):
                    return  # what no client can send
                statuses.append(door.send(method, url, **request))

            one()
    assert len(statuses) >= NUM_CASES // 4
    assert set(statuses) >= {200, 400}
