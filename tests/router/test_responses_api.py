"""OpenAI's Responses over HTTP, by its own client and shape by shape."""

import asyncio
import json
from typing import Any, get_args

import jsonschema
import openai
import pydantic
import pytest
from openai.types.responses import ResponseIncludable

from replicas.errors import ErrorCode
from replicas.text import TextCodec
from router.api import create_app
from tests.eventually import eventually
from tests.router.conftest import in_process, over_http, running
from tests.router.fakes import MODEL, TEXT, WORDS, ScriptedReplica
from tests.router.stack import a_stack
from tests.router.test_api import error_of
from tests.router.test_tools import SCHEMAS, WEATHER, codec, runner

__all__ = ["codec", "runner"]

BODY: dict[str, Any] = {"model": MODEL, "input": "How is the weather in Oslo?"}
TOOLS = [
    {"type": "function", "name": "get_weather", "parameters": WEATHER, "description": "How it is."},
    {"type": "function", "name": "get_time", "parameters": None, "strict": True},
]
NAMED = {"type": "function", "name": "get_weather"}
HISTORY: list[dict[str, Any]] = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": [{"type": "input_text", "text": text} for text in ("How ", "is it?")]},
    {"type": "reasoning", "id": "rs_1", "content": [{"type": "reasoning_text", "text": "Hm."}]},
    {
        "type": "message",
        "id": "msg_1",
        "status": "completed",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "Let me see.", "annotations": [], "logprobs": []}],
    },
    {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": '{"city":"Oslo"}'},
    {"type": "function_call", "call_id": "c2", "name": "get_time", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c1", "output": "Sunny."},
    {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "12:00"}]},
    {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
    {"role": "user", "content": "So?"},
]  # fmt: skip


def a_client(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of a stream, whose names and numbers are right."""
    found = []
    for part in filter(None, text.split("\n\n")):
        name, data = part.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


async def test_responses_as_the_openai_client_takes_them(make_door) -> None:
    replica = ScriptedReplica("a")
    door = await make_door(replica)
    async with running(replica.run()), over_http(create_app(door)) as url:
        client = a_client(url)
        whole = await client.responses.create(
            **BODY, instructions="Be brief.", store=True, metadata={"a": "b"}
        )
        assert whole.output_text == TEXT
        assert (whole.status, whole.error, whole.store) == ("completed", None, False)
        assert (whole.instructions, whole.metadata) == ("Be brief.", {"a": "b"})
        assert (whole.usage.input_tokens, whole.usage.output_tokens) == (5, len(WORDS))
        assert whole.decoding["tokens_per_forward"] == 1.2

        async with client.responses.stream(**BODY) as stream:
            names = [event.type async for event in stream]
            final = await stream.get_final_response()
        assert final.output_text == TEXT
        assert names == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            *["response.output_text.delta"] * names.count("response.output_text.delta"),
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.completed",
        ]
        with pytest.raises(openai.BadRequestError, match="input") as bad:
            await client.responses.create(**BODY, previous_response_id="resp_1")
        assert bad.value.param == "previous_response_id"
        with pytest.raises(openai.NotFoundError):
            await client.responses.create(**BODY | {"model": "gpt"})


async def test_calls_as_the_openai_client_takes_them(runner: Any, codec: TextCodec) -> None:
    async with a_stack([runner], codec=codec) as stack, over_http(create_app(stack.door)) as url:
        client = a_client(url)
        body = BODY | {"tools": TOOLS, "temperature": 0, "max_output_tokens": 120}
        allowed = {"type": "allowed_tools", "mode": "required", "tools": [NAMED]}
        for choice in (NAMED, allowed, "required"):
            asked = body | {"tool_choice": choice, "parallel_tool_calls": False}
            whole = await client.responses.create(**asked)
            (call,) = whole.output
            assert (whole.status, call.type) == ("completed", "function_call")
            jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
            async with client.responses.stream(**asked) as stream:
                final = await stream.get_final_response()
            (again,) = final.output
            assert (again.name, again.arguments) == (call.name, call.arguments)
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny."}
        items = [{"role": "user", "content": BODY["input"]}, *whole.output, result]
        answer = await client.responses.create(**body | {"input": items, "max_output_tokens": 3})
        assert answer.usage.output_tokens <= 3
        await stack.settled()


class Weather(pydantic.BaseModel):
    city: str = pydantic.Field(max_length=8)
    days: int = pydantic.Field(ge=1, le=7)


async def test_forms_and_decoding(runner: Any, codec: TextCodec) -> None:
    async with a_stack([runner], codec=codec) as stack, over_http(create_app(stack.door)) as url:
        client = a_client(url)
        more = {"temperature": 0, "max_output_tokens": 60}
        parsed = await client.responses.parse(**BODY, **more, text_format=Weather)
        assert 1 <= parsed.output_parsed.days <= 7
        whole = await client.responses.create(**BODY, **more, text={"format": {"type": "json_object"}})
        assert whole.status == "incomplete" or isinstance(json.loads(whole.output_text), dict)
        for mode in ("ar", "diffusion", "self_speculation"):
            asked = BODY | {
                "temperature": 0,
                "max_output_tokens": 8,
                "extra_body": {"decoding": {"mode": mode}},
            }
            whole = await client.responses.create(**asked)
            assert set(whole.decoding["tokens"]) == {mode}
            assert (whole.status, whole.incomplete_details.reason) == ("incomplete", "max_output_tokens")
            assert whole.output[-1].status == "incomplete"
            async with client.responses.stream(**asked) as stream:
                seen = [event async for event in stream]
            assert seen[-1].type == "response.incomplete"
            assert seen[-1].response.output_text == whole.output_text
            assert seen[-2].item.status == "incomplete"


async def test_what_is_asked_reaches_the_replica(make_door) -> None:
    replica = ScriptedReplica("a")
    door = await make_door(replica)
    async with running(replica.run()), in_process(create_app(door)) as client:
        more = {
            "input": HISTORY,
            "instructions": "Be kind.",
            "tools": TOOLS,
            "tool_choice": "required",
            "parallel_tool_calls": False,
            "reasoning": {"effort": "none", "summary": "auto"},
            "max_output_tokens": 9,
            "include": ["reasoning.encrypted_content"],
            "service_tier": "flex",
            "seed": 7,
        }
        response = await client.post("/v1/responses", json=BODY | more)
        assert response.status_code == 200, response.text
        told = response.json()
        plain = await client.post("/v1/responses", json=BODY | {"tool_choice": "auto", "tools": []})
        assert plain.status_code == 200
    assert (told["service_tier"], told["tool_choice"], len(told["tools"])) == ("default", "required", 2)
    sent = replica.submitted[0]
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}},
        {"id": "c2", "type": "function", "function": {"name": "get_time", "arguments": {}}},
    ]
    turn = {"role": "assistant", "content": "Let me see.", "reasoning_content": "Hm.", "tool_calls": calls}
    assert sent.prompts == (
        (
            {"role": "system", "content": "Be kind."},
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "How is it?"},
            turn,
            {"role": "tool", "tool_call_id": "c1", "content": "Sunny."},
            {"role": "tool", "tool_call_id": "c2", "content": "12:00"},
            {"role": "assistant", "content": "No."},
            {"role": "user", "content": "So?"},
        ),
    )
    assert (sent.sampling.max_tokens, sent.sampling.seed) == (9, 7)
    assert (sent.sampling.tools.is_required, sent.sampling.tools.is_parallel) == (True, False)
    assert json.loads(sent.template.kwargs) == {"reasoning_effort": "none", "enable_thinking": False}


CALLED = {"type": "function_call", "call_id": "c1", "name": "get_time", "arguments": "{}"}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "12:00"}
DIRECT = {"type": "direct"}


async def test_what_asks_for_nothing_is_taken(make_door) -> None:
    """What OpenAI's clients send of late, by values that ask for what is done anyway."""
    replica = ScriptedReplica("a")
    tool = TOOLS[0] | {"allowed_callers": ["direct"], "defer_loading": False, "async": False}
    more = {
        "input": [
            CALLED | {"caller": DIRECT, "async": False},
            RESULT | {"caller": DIRECT, "name": "get_time"},
        ],
        "tools": [tool | {"output_schema": {"type": "string"}}],
        "reasoning": {"context": "auto", "mode": "standard"},
        "background_options": {"completion_window": "soonest"},
        "access_programs": {"cyber": "standard"},
        "image": {"context_compression": "auto"},
        "moderation": None,
        "include": sorted({*get_args(ResponseIncludable)} - {"message.output_text.logprobs"}),
        "stream_options": {"include_obfuscation": False},
        "safety_identifier": "s",
        "prompt_cache_retention": "24h",
        "prompt_cache_options": {"mode": "explicit", "ttl": "30m"},
        "text": {"verbosity": "low"},
        "stream": True,
    }
    async with running(replica.run()), in_process(create_app(await make_door(replica))) as client:
        for body in (
            BODY | more,
            BODY | {"tools": [TOOLS[0]], "input": [CALLED, RESULT | {"name": "get_time"}]},
        ):
            response = await client.post("/v1/responses", json=body)
            assert response.status_code == 200, response.text
    latest, plain = replica.submitted
    assert (latest.prompts, latest.sampling.tools) == (plain.prompts, plain.sampling.tools)
    assert latest.prompts[0][-1]["name"] == "get_time"


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "["}]}, "input[0]"),
        ({"input": "x" * 1_000_001}, "input"),
        ({"input": "\ud800"}, "input"),
        ({"input": [{"role": "user", "content": "\ud800"}]}, "input[0].content"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": "\ud800"}]}]},
            "input[0].content[0].text",
        ),
        ({"input": [{**RESULT, "output": "\ud800"}]}, "input[0].output"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"truncation": "last"}, "truncation"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"include": ["message.output_text.logprobs"]}, "include[0]"),
        ({"reasoning": {"context": "current_turn"}}, "reasoning.context"),
        ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
        ({"background_options": {"completion_window": "8h"}}, "background_options"),
        ({"access_programs": {"cyber": "daybreak_red"}}, "access_programs"),
        ({"moderation": {"model": "m"}}, "moderation"),
        (
            {"stream_options": {"include_obfuscation": True}, "stream": True},
            "stream_options.include_obfuscation",
        ),
        ({"tools": [TOOLS[0] | {"async": True}]}, "tools[0].async"),
        ({"tools": [TOOLS[0] | {"defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tools": [TOOLS[0] | {"allowed_callers": ["programmatic"]}]}, "tools[0].allowed_callers"),
        ({"input": [CALLED | {"caller": {"type": "program", "caller_id": "p"}}]}, "input[0].caller"),
        ({"input": [CALLED | {"async": True}]}, "input[0].async"),
        ({"input": [CALLED | {"namespace": "n"}]}, "input[0].namespace"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [{"type": "function", "name": "two words"}]}, "tools[0].name"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "tools[2].name"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "f"}}, "tool_choice.name"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "text", "schema": {}}}}, "text.format.schema"),
        ({"max_tokens": 3}, "max_tokens"),
        ({"decoding": {"mode": "quick"}}, "decoding.mode"),
    ],
)
async def test_what_is_wrong_is_named(make_door, more: dict[str, Any], param: str) -> None:
    async with in_process(create_app(await make_door(ScriptedReplica("a")))) as client:
        body = {name: value for name, value in (BODY | more).items() if value is not None}
        # Not by httpx's own encoder, which writes no lone surrogate.
        sent = {"content": json.dumps(body), "headers": {"content-type": "application/json"}}
        assert error_of(await client.post("/v1/responses", **sent), 400)["param"] == param


async def test_a_reference_to_an_item_is_told_what_to_send(make_door) -> None:
    async with in_process(create_app(await make_door(ScriptedReplica("a")))) as client:
        body = BODY | {"input": [{"type": "item_reference", "id": "msg_1"}]}
        error = error_of(await client.post("/v1/responses", json=body), 400)
    assert (error["param"], error["code"]) == ("input[0]", "unsupported_value")
    assert "store: false" in error["message"]


async def test_a_schema_that_the_replica_refuses_is_named(runner: Any, codec: TextCodec) -> None:
    async with a_stack([runner], codec=codec) as stack, in_process(create_app(stack.door)) as client:
        schema = {"type": "array", "uniqueItems": True}
        form = {"type": "json_schema", "name": "x", "strict": True, "schema": schema}
        error = error_of(await client.post("/v1/responses", json=BODY | {"text": {"format": form}}), 400)
        assert error["param"] == "text.format.schema"


async def test_a_stream_that_breaks_fails_once(make_door) -> None:
    replica = ScriptedReplica("a")
    door = await make_door(replica)
    async with in_process(create_app(door)) as client:
        asking = asyncio.create_task(client.post("/v1/responses", json=BODY | {"stream": True}))
        await eventually(lambda: len(replica.live) == 1)
        (request_id,) = replica.live
        replica.step(request_id)
        replica.fail(request_id, ErrorCode.INTERNAL, "the forward failed")
        events = events_of((await asking).text)
    ends = [event for event in events if event["type"].endswith(("completed", "failed", "incomplete"))]
    assert ends == events[-1:]
    assert ends[0]["type"] == "response.failed"
    assert ends[0]["response"]["error"] == {"code": "server_error", "message": "the forward failed"}


async def test_a_client_that_goes_is_noticed(make_door) -> None:
    replica = ScriptedReplica("a")
    door = await make_door(replica)
    async with over_http(create_app(door)) as url:
        asking = asyncio.create_task(a_client(url).responses.create(**BODY, stream=True))
        await eventually(lambda: len(replica.live) == 1)
        (request_id,) = replica.live
        replica.step(request_id)
        await (await asking).close()
        await eventually(lambda: replica.cancelled == [request_id])


@pytest.mark.parametrize("length", [20, 400, 40_000])
async def test_a_conversation_too_long_loses_its_first_turns(runner, codec: TextCodec, length: int) -> None:
    turns = [
        {"role": role, "content": f"{role} {number} " + "x" * length}
        for number in range(9)
        for role in ("user", "assistant")
    ]
    last = {"role": "user", "content": "So?"}
    body = {"model": MODEL, "instructions": "Be brief.", "max_output_tokens": 5, "input": [*turns, last]}
    async with a_stack([runner], codec=codec) as stack, in_process(create_app(stack.door)) as client:
        refused = await client.post("/v1/responses", json=body)
        answer = await client.post("/v1/responses", json=body | {"truncation": "auto"})
        assert answer.status_code == 200, answer.text
        told = answer.json()
        assert told["truncation"] == "auto"
        max_context = stack.replicas[0].engine.spec.max_context
        assert told["usage"]["input_tokens"] + 5 <= max_context
        if length == 20:
            assert told["usage"]["input_tokens"] == refused.json()["usage"]["input_tokens"]
        else:
            assert error_of(refused, 400)["code"] == "context_length_exceeded"
        chat = [{"role": "system", "content": "Be brief."}, *turns, last]
        asked = {"messages": chat, "model": MODEL, "max_tokens": 5, "truncation": "auto"}
        same = await client.post("/v1/chat/completions", json=asked)
        assert same.status_code == 200, same.text
        assert same.json()["usage"]["prompt_tokens"] == told["usage"]["input_tokens"]
        alone = {"input": "x" * 40_000, "model": MODEL, "truncation": "auto"}
        error = error_of(await client.post("/v1/responses", json=alone), 400)
        assert error["code"] == "context_length_exceeded"
        both = asked | {"truncate_prompt_tokens": 9}
        assert error_of(await client.post("/v1/chat/completions", json=both), 400)["param"] == "truncation"
        await stack.settled()
