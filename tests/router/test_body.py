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
from pydantic import BaseModel, PrivateAttr

from router.api import create_app
from router.body import INLINE_BYTES, BodyReader, read
from router.completion import Completion
from router.config import MAX_JSON_DEPTH, Bounds
from router.errors import ApiError
from router.fields import json_depth
from router.operate import PolicyBody
from router.schema import ChatCompletionRequest, CompletionRequest
from tests.replicas.engine.scripted import ScriptedRunner
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
            assert error["param"] == "tools[0]"


def nested(depth: int) -> str:
    """The text of a JSON object nested so deep."""
    return '{"a":' + "[" * (depth - 1) + "]" * (depth - 1) + "}"


def calling(arguments: str) -> dict[str, Any]:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"messages": [{"role": "assistant", "tool_calls": [call]}]}


def once_calling(arguments: str) -> dict[str, Any]:
    return {
        "messages": [{"role": "assistant", "function_call": {"name": "f", "arguments": arguments}}],
    }


IN_STRINGS = [
    (PATH, calling, "messages[0].tool_calls[0].function.arguments"),
    (PATH, once_calling, "messages[0].function_call.arguments"),
    ("/tokenize", calling, "messages[0].tool_calls[0].function.arguments"),
    (
        "/v1/responses",
        lambda text: {"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": text}]},
        "input[0]",
    ),
    (PATH, lambda text: CHAT | {"structured_outputs": {"json": text}}, "structured_outputs.json"),
    (
        "/v1/completions",
        lambda text: {"prompt": "x", "structured_outputs": {"structural_tag": text}},
        "structured_outputs.structural_tag",
    ),
]


@pytest.mark.parametrize("num_blanks", [0, INLINE_BYTES], ids=["short", "long"])
async def test_json_in_a_string_nested_too_deep_is_the_requests_fault(num_blanks):
    runners = [ScriptedRunner(num_pages=512, max_context=1024) for _ in range(2)]
    async with a_stack(runners) as stack:
        async with in_process(create_app(stack.door)) as client:
            for path, body, param in IN_STRINGS:
                for depth in (MAX_JSON_DEPTH + 1, 600, 100_000):
                    content = json.dumps(body(nested(depth))) + " " * num_blanks
                    error = error_of(await client.post(path, content=content, headers=JSON), 400)
                    assert (error["param"] or "").startswith(param), error
                    assert str(MAX_JSON_DEPTH) in error["message"]
            for path, body, _ in IN_STRINGS[:4]:
                content = json.dumps(body(nested(MAX_JSON_DEPTH)) | {"model": MODEL}) + " " * num_blanks
                assert (await client.post(path, content=content, headers=JSON)).status_code == 200
        assert not stack.dispatcher._connections._watch._failing
        await stack.settled()


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


class Unsendable(BaseModel):
    """What pickle does not take."""

    user: str
    _made: Any = PrivateAttr(default_factory=lambda: lambda: None)


async def test_a_body_that_can_not_be_sent_back_costs_no_other(reader):
    body = json.dumps(CHAT | {"user": "x" * INLINE_BYTES}).encode()
    await reader.read(ChatCompletionRequest, body)
    process = reader._process
    with pytest.raises(ApiError, match="can't be read") as error:
        await reader.read(Unsendable, body)
    assert (error.value.status, error.value.code) == (400, "invalid_json")
    assert (await reader.read(ChatCompletionRequest, body)).model == MODEL
    assert reader._process is process


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
        (b"\xff\xfe\x00", "UTF-8"),
        (b"{", "line 1"),
        (b"[" * 20, "valid JSON"),
    ]:
        with pytest.raises(ApiError, match=word):
            read(PolicyBody, body, Bounds())


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_json_is_read_as_utf_8(encoding):
    body = json.dumps(CHAT | {"user": "é∁"}, ensure_ascii=False).encode(encoding)
    assert read(ChatCompletionRequest, body, Bounds()).user == "é∁"


@pytest.mark.parametrize(
    "encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be", "latin-1"]
)
@pytest.mark.parametrize("depth", [1, 31, 600])
def test_other_encodings_are_refused_whatever_they_hide(encoding, depth):
    # In UTF-16 a '∁' has the byte of a quotation mark, behind which no bracket counts.
    odd = "é" if encoding == "latin-1" else "∁"
    body = f'{{"user": "{odd}", "tools": {"[" * depth}{"]" * depth}}}'.encode(encoding)
    with pytest.raises(ApiError, match="UTF-8" if depth < 600 else "UTF-8|nested") as error:
        read(ChatCompletionRequest, body, Bounds())
    assert (error.value.status, error.value.code) == (400, "invalid_json")


SENT_ON = [
    (PolicyBody, '{"policy": "ar", "policy_params": %s}', "policy_params"),
    (ChatCompletionRequest, '{"messages": [], "chat_template_kwargs": %s}', "chat_template_kwargs"),
    (
        ChatCompletionRequest,
        '{"messages": [], "tools": [{"type": "function", "function": {"name": "f", "parameters": %s}}]}',
        "tools[0].function.parameters",
    ),
    (CompletionRequest, '{"prompt": "x", "structured_outputs": {"json": %s}}', "structured_outputs.json"),
]


@pytest.mark.parametrize(("model", "body", "param"), SENT_ON, ids=[param for *_, param in SENT_ON])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        ('{"a": "\\ud800"}', "lone surrogate"),
        ('{"a": NaN}', "JSON|number"),
        ('{"a": "%s"}' % ("x" * 2**16), "at most"),
    ],
    ids=["surrogate", "no number", "long"],
)
def test_an_object_that_is_sent_on_is_json_of_bounded_length(model, body, param, value, words):
    sent = (body % value).replace("[]", '[{"role": "user", "content": "x"}]')
    with pytest.raises(ApiError, match=words) as error:
        read(model, sent.encode(), Bounds())
    assert error.value.param == param
