"""JSON bodies: bounded, read beside the streams, and refused with the field at fault."""

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from router.api import create_app
from router.body import INLINE_BYTES, BodyReader, json_depth, read
from router.completion import Completion
from router.config import Bounds
from router.errors import ApiError
from router.operate import PolicyBody
from router.schema import ChatCompletionRequest, CompletionRequest
from tests.router.conftest import in_process, running
from tests.router.fakes import MODEL, TEXT, ScriptedReplica
from tests.router.stack import a_stack
from tests.router.stall import Stall
from tests.router.test_api import CHAT, error_of
from tests.router.test_sse import events

PATH = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
MESSAGES = json.dumps(CHAT)[:-1].encode()
SIZE = 8 * 2**20 - 2**10


def depth_by_hand(value: object) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth_by_hand, inner), default=0)


def some_json(rng: random.Random, depth: int) -> object:
    if depth == 0 or rng.random() < 0.3:
        return rng.choice([1, None, True, "]", '"{', "\\", "[[", "é", '\\"', 2.5])
    if rng.random() < 0.5:
        return [some_json(rng, depth - 1) for _ in range(rng.randrange(3))]
    return {rng.choice(["a{", '"', "]\\"]): some_json(rng, depth - 1)}


def test_depth_is_that_of_the_parsed_value():
    rng = random.Random(1)
    for _ in range(500):
        value = some_json(rng, 7)
        assert json_depth(json.dumps(value).encode()) == depth_by_hand(value)


@pytest.mark.parametrize("body", [b'"\\' * 2**20, b"[" * 2**22, b'"' * 2**21 + b"\\", b"[]" * 2**21, b""])
def test_no_body_takes_long_to_look_through(body):
    began_s = time.process_time()
    json_depth(body)
    assert time.process_time() - began_s < 5.0  # a quadratic one would take hours


async def test_json_nested_too_deep_is_a_400(make_door):
    door = await make_door(ScriptedReplica("a"))
    async with in_process(create_app(door)) as client:
        for num in (33, 1000, 100_000):
            body = json.dumps(CHAT)[:-1].encode() + b', "tools": ' + b"[" * num + b"]" * num + b"}"
            error = error_of(
                await client.post(PATH, content=body, headers={"Content-Type": "application/json"}), 400
            )
            assert "nested deeper than 32" in error["message"]
        for num in (20, 31):
            body = json.dumps(CHAT)[:-1].encode() + b', "tools": ' + b"[" * num + b"]" * num + b"}"
            error = error_of(
                await client.post(PATH, content=body, headers={"Content-Type": "application/json"}), 400
            )
            assert error["param"] == "tools"


def repeated(item: bytes, before: bytes, after: bytes) -> bytes:
    """A body of about the greatest length."""
    return before + b",".join([item] * ((SIZE - len(before)) // (len(item) + 1))) + after


def numbered(before: bytes) -> bytes:
    """An object of very many members."""
    return before + b"{" + b",".join(b'"%d":1' % number for number in range(500_000)) + b"}}"


PROMPT = b'{"model": "%s", "prompt": ' % MODEL.encode()
WORST = {
    "faulty messages": (PATH, repeated(b"{}", MESSAGES + b', "messages": [', b"]}")),
    "messages of another type": (PATH, repeated(b"5", MESSAGES + b', "messages": [', b"]}")),
    "messages": (PATH, repeated(b'{"role":"user","content":""}', MESSAGES + b', "messages": [', b"]}")),
    "content parts": (
        PATH,
        repeated(
            b'{"type":"text","text":"abcd"}',
            MESSAGES + b', "messages": [{"role": "user", "content": [',
            b"]}]}",
        ),
    ),
    "stops": (PATH, repeated(b"5", MESSAGES + b', "stop": [', b"]}")),
    "biases": (PATH, numbered(MESSAGES + b', "logit_bias": ')),
    "metadata": (PATH, numbered(MESSAGES + b', "metadata": ')),
    "unknown fields": (PATH, numbered(MESSAGES + b', "decoding": ')),
    "a schema": (PATH, numbered(MESSAGES + b', "response_format": ')),
    "nesting": (PATH, MESSAGES + b', "tools": ' + b"[" * 2**22 + b"]" * (2**22 - 2**12) + b"}"),
    "token ids": ("/v1/completions", repeated(b"1", PROMPT + b"[", b"]}")),
    "fewer token ids": ("/v1/completions", PROMPT + b"[" + b"499," * 999_999 + b"1]}"),
    "token ids as floats": ("/v1/completions", PROMPT + b"[" + b"1.0," * 999_999 + b"1]}"),
    "token ids of 4,000 digits": ("/v1/completions", repeated(b"9" * 4000, PROMPT + b"[", b"]}")),
    "prompts": ("/v1/completions", repeated(b'""', PROMPT + b"[", b"]}")),
    "text": ("/v1/completions", PROMPT + b'"' + b"a" * (SIZE - 100) + b'"}'),
    "escaped text": ("/v1/completions", PROMPT + b'"' + b"\\u00e9" * (SIZE // 6 - 20) + b'"}'),
    "a number": (PATH, MESSAGES + b', "temperature": 1' + b"0" * (SIZE - 200) + b"}"),
    "a fraction": (PATH, MESSAGES + b', "temperature": 0.' + b"3" * (SIZE - 200) + b"9, }"),
    "a field's name": (PATH, MESSAGES + b', "' + b"x" * (SIZE - 200) + b'": 1}'),
    "a model's name": (PATH, b'{"messages": [], "model": "' + b"x" * (SIZE - 200) + b'"}'),
}


async def test_no_body_stops_the_loop_that_carries_the_streams():
    stall = Stall()
    async with a_stack() as stack, in_process(create_app(stack.door)) as client:
        stream = CHAT | {"stream": True, "max_tokens": 60, "ignore_eos": True, "temperature": 0}
        alone = text_of(await client.post(PATH, json=stream))
        texts = []

        async def keep_streaming() -> None:
            while True:
                texts.append(text_of(await client.post(PATH, json=stream)))

        async with running(keep_streaming()):
            for what, (path, body) in WORST.items():
                request = client.build_request("POST", path, content=body, headers=JSON)
                async with running(stall.run()):
                    stall.longest_s = 0.0
                    response = await client.send(request)
                error = error_of(response, 400)
                assert stall.longest_s < 0.1, f"{what}: {stall.longest_s} s"
                assert len(response.content) < 3000, what
                assert len(error["param"] or "") <= 200
        assert set(texts) == {alone}
        await stack.settled()


def text_of(response: httpx.Response) -> str:
    chunks = events(response.content)
    assert chunks.pop() == "[DONE]"
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


@pytest.fixture
def reader() -> Iterator[BodyReader]:
    reader = BodyReader(Bounds(), max_read_s=60.0)
    yield reader
    reader.close()


async def outcome(reader: BodyReader, model: type[Completion], body: dict[str, Any]) -> Any:
    try:
        return await reader.read(model, json.dumps(body).encode())
    except ApiError as error:
        return (error.status, error.code, error.message, error.param)


@pytest.mark.parametrize(
    ("model", "body", "param"),
    [
        (ChatCompletionRequest, CHAT | {"seed": -3, "stop": "END", "decoding": {"mode": "ar"}}, None),
        (CompletionRequest, {"model": MODEL, "prompt": [[1, 2.0], "Hi"], "logprobs": 3}, None),
        (ChatCompletionRequest, CHAT | {"decoding": {"block_length": 100}}, "decoding.block_length"),
        (ChatCompletionRequest, CHAT | {"decoding": {"zzz": 1}}, "decoding.zzz"),
        (ChatCompletionRequest, {"model": MODEL}, "messages"),
    ],
)
async def test_a_long_body_is_read_as_a_short_one_is(reader, model, body, param):
    short = await outcome(reader, model, body | {"user": "x"})
    long = await outcome(reader, model, body | {"user": "x" * INLINE_BYTES})
    if param is None:
        assert long == short.model_copy(update={"user": long.user})
        assert long.sampling(lambda: 1) == short.sampling(lambda: 1)
        assert long.prompts_for_replica() == short.prompts_for_replica()
    else:
        assert long == short
        assert short[3] == param


async def test_a_reading_process_that_is_lost_costs_one_body(reader):
    body = json.dumps(CHAT | {"user": "x" * INLINE_BYTES}).encode()
    await reader.read(ChatCompletionRequest, body)
    lost = reader._process.pid
    os.kill(lost, signal.SIGKILL)
    with pytest.raises(ApiError) as error:
        await reader.read(ChatCompletionRequest, body)
    assert (error.value.status, error.value.retry_after_s) == (503, 1)
    assert (await reader.read(ChatCompletionRequest, body)).model == MODEL
    assert reader._process.pid != lost


async def test_a_body_that_takes_too_long_is_refused_and_the_next_one_read():
    reader = BodyReader(Bounds(), max_read_s=0.0)
    body = json.dumps(CHAT | {"user": "x" * INLINE_BYTES}).encode()
    with pytest.raises(ApiError, match="takes more than 0 s"):
        await reader.read(ChatCompletionRequest, body)
    reader._max_read_s = 60.0
    assert (await reader.read(ChatCompletionRequest, body)).model == MODEL
    reader.close()


async def test_the_reading_process_ends_with_the_app(make_door):
    replica = ScriptedReplica("a")
    app = create_app(await make_door(replica))
    long = CHAT | {"messages": [{"role": "user", "content": "x" * INLINE_BYTES}]}
    before = children()
    async with running(replica.run()), app.router.lifespan_context(app):
        async with in_process(app) as client:
            answer = await client.post(PATH, json=long)
            assert answer.json()["choices"][0]["message"]["content"] == TEXT
        assert len(children() - before) == 1
    assert children() == before


def children() -> set[str]:
    """Of this process, whichever of its threads started them."""
    tasks = f"/proc/{os.getpid()}/task"
    return {pid for task in os.listdir(tasks) for pid in open(f"{tasks}/{task}/children").read().split()}


def test_what_is_no_json_says_why():
    for body, word in [
        (b'{"model": ' + b"9" * 5000 + b"}", "digits"),
        (b"\xff\xfe\x00", "decode"),
        (b"{", "line 1"),
        (b"[" * 20, "valid JSON"),
    ]:
        with pytest.raises(ApiError, match=word):
            read(PolicyBody, body, Bounds())
