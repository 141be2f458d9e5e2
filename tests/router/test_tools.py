"""Tools over HTTP, with the embedded model behind the door: calls are as OpenAI sends them."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest

import replicas
from replicas.model.runner import TorchRunner
from replicas.text import TextCodec
from router.api import create_app
from tests.router.conftest import in_process, over_http, running
from tests.router.fakes import MODEL, ScriptedReplica
from tests.router.stack import a_stack
from tests.router.test_api import CHAT, error_of

FOLDER = str(Path(replicas.__path__[0]) / "checkpoints" / "triad-5m")
WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "unit": {"enum": ["C", "F"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 7},
    },
    "required": ["city", "unit", "days"],
    "additionalProperties": False,
}
TIME = {"type": "object", "properties": {}, "additionalProperties": False}
SCHEMAS = {"get_weather": WEATHER, "get_time": TIME}


def tool(name: str, parameters: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters or TIME} | more}


TOOLS = [tool("get_weather", WEATHER, description="How it is."), tool("get_time", strict=True)]
NAMED = {"type": "function", "function": {"name": "get_weather"}}
ASKED = [{"role": "user", "content": "How is the weather in Oslo?"}]


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def sent(arguments: str, **more: Any) -> dict[str, Any]:
    return {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}} | more


@pytest.fixture(scope="module")
def runner() -> TorchRunner:
    return TorchRunner.load(FOLDER, dtype="float32", num_pages=200, page_size=16)


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    return TextCodec.load(FOLDER)


def checked(calls: list[Any]) -> list[tuple[str, dict[str, Any]]]:
    """Names and arguments of calls, which validate and have ids of their own."""
    assert len({call.id for call in calls}) == len(calls)
    for call in calls:
        assert call.id.startswith("call_")
        assert call.type == "function"
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
    return [(call.function.name, json.loads(call.function.arguments)) for call in calls]


async def streamed(client: openai.AsyncOpenAI, **body: Any) -> tuple[list[Any], Any]:
    """The choices of a stream put together, as clients do it, and its usage."""
    messages: dict[int, dict[str, Any]] = {}
    usage = None
    options = {"stream": True, "stream_options": {"include_usage": True}}
    async for chunk in await client.chat.completions.create(**body, **options):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            made = messages.setdefault(choice.index, {"content": "", "calls": [], "end": None, "tokens": []})
            assert made["end"] is None, "something came after the end"
            made["content"] += choice.delta.content or ""
            made["tokens"] += [] if choice.logprobs is None else choice.logprobs.content
            for piece in choice.delta.tool_calls or []:
                if piece.id is not None:
                    assert piece.index == len(made["calls"])
                    assert piece.type == "function"
                    made["calls"].append([piece.function.name, ""])
                made["calls"][piece.index][1] += piece.function.arguments
            made["end"] = choice.finish_reason
    return [messages[index] for index in sorted(messages)], usage


async def test_calls_as_the_openai_client_takes_them(runner: TorchRunner, codec: TextCodec) -> None:
    async with a_stack([runner], codec=codec) as stack, over_http(create_app(stack.door)) as url:
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        body = {"model": MODEL, "messages": ASKED, "tools": TOOLS, "temperature": 0, "max_tokens": 120}
        for choice in (NAMED, "required", allowed("required", "get_weather")):
            asked = body | {"tool_choice": choice, "parallel_tool_calls": False}
            whole = await client.chat.completions.create(**asked)
            (made,) = whole.choices
            assert made.finish_reason == "tool_calls"
            assert made.message.content is None
            calls = checked(made.message.tool_calls)
            assert len(calls) == 1
            assert choice == "required" or calls[0][0] == "get_weather"
            (again,), usage = await streamed(client, **asked)
            assert [(name, json.loads(text)) for name, text in again["calls"]] == calls
            assert (again["content"], again["end"]) == ("", "tool_calls")
            assert usage.completion_tokens == whole.usage.completion_tokens

        for choice in ("auto", None, "none"):
            asked = body | {} if choice is None else body | {"tool_choice": choice}
            whole = await client.chat.completions.create(**asked)
            (made,) = whole.choices
            (again,), _ = await streamed(client, **asked)
            assert again["content"] == (made.message.content or "")
            assert again["end"] == made.finish_reason
            assert "<tool" not in again["content"]

        call = {
            "id": "c1",
            "type": "function",
            "function": {"name": "get_weather", "arguments": '{"city":"Oslo"}'},
        }
        history = [
            *ASKED,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "Sunny."}]},
            {"role": "assistant", "function_call": {"name": "get_time", "arguments": ""}},
            {"role": "function", "name": "get_time", "content": "12:00"},
        ]
        for more in ({"tools": TOOLS}, {}):
            answer = await client.chat.completions.create(model=MODEL, messages=history, max_tokens=5, **more)
            assert answer.usage.completion_tokens == 5 or answer.choices[0].finish_reason == "stop"
        await stack.settled()


async def test_choices_and_logprobs_go_with_calls(runner: TorchRunner, codec: TextCodec) -> None:
    async with a_stack([runner], codec=codec) as stack, over_http(create_app(stack.door)) as url:
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        body = {
            "model": MODEL, "messages": ASKED, "tools": TOOLS, "tool_choice": NAMED, "temperature": 1,
            "seed": 7, "n": 2, "logprobs": True, "top_logprobs": 1, "max_tokens": 120,
            "parallel_tool_calls": False,
        }  # fmt: skip
        whole = await client.chat.completions.create(**body)
        made, usage = await streamed(client, **body)
        assert usage.completion_tokens == whole.usage.completion_tokens
        for choice, again in zip(whole.choices, made, strict=True):
            text = "".join(entry.token for entry in choice.logprobs.content)
            assert [entry.token for entry in again["tokens"]] == [e.token for e in choice.logprobs.content]
            assert text.startswith('<tool_call>\n{"name": "get_weather", "arguments": {')
            calls = checked(choice.message.tool_calls)
            assert calls == [(name, json.loads(given)) for name, given in again["calls"]]


async def test_calls_in_diffusion_are_what_the_schema_allows(runner: TorchRunner, codec: TextCodec) -> None:
    async with a_stack([runner], codec=codec) as stack, in_process(create_app(stack.door)) as client:
        body = {
            "model": MODEL, "messages": ASKED, "tools": TOOLS, "tool_choice": "required",
            "temperature": 0, "max_tokens": 120, "decoding": {"mode": "diffusion"},
        }  # fmt: skip
        response = await client.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        (made,) = response.json()["choices"]
        assert set(response.json()["decoding"]["tokens"]) == {"diffusion"}
        assert made["finish_reason"] == "tool_calls"
        for call in made["message"]["tool_calls"]:
            assert call["function"]["name"] in {offered["function"]["name"] for offered in TOOLS}
            assert isinstance(json.loads(call["function"]["arguments"]), dict)


async def test_what_ends_a_call_early_is_told(runner: TorchRunner, codec: TextCodec) -> None:
    async with a_stack([runner], codec=codec) as stack, in_process(create_app(stack.door)) as client:
        body = {"model": MODEL, "messages": ASKED, "tools": TOOLS, "tool_choice": NAMED, "temperature": 0}
        response = await client.post("/v1/chat/completions", json=body | {"max_tokens": 3})
        (made,) = response.json()["choices"]
        assert (made["finish_reason"], made["message"]["content"]) == ("length", "")
        response = await client.post("/v1/chat/completions", json=body | {"stop": '"city"'})
        (made,) = response.json()["choices"]
        assert made["finish_reason"] == "stop"
        (call,) = made["message"]["tool_calls"]
        assert call["function"] == {"name": "get_weather", "arguments": "{"}


@pytest.mark.parametrize(
    ("more", "param", "says"),
    [
        ({"ignore_eos": True}, "ignore_eos", "tools"),
        ({"min_tokens": 3}, "min_tokens", "tools"),
        ({"tools": [*TOOLS, tool("f", {"$ref": "#/no"})]}, "tools[2].function.parameters", "no"),
        (
            {
                "tools": [
                    tool("f", {"properties": {"a": {"uniqueItems": True, "type": "array"}}}, strict=True)
                ]
            },
            "tools[0].function.parameters",
            '"strict": false',
        ),
    ],
)
async def test_what_the_replica_refuses_names_the_field(
    runner: TorchRunner, codec: TextCodec, more: dict, param: str, says: str
) -> None:
    async with a_stack([runner], codec=codec) as stack, in_process(create_app(stack.door)) as client:
        body = {"model": MODEL, "messages": ASKED, "tools": TOOLS} | more
        error = error_of(await client.post("/v1/chat/completions", json=body), 400)
        assert error["param"] == param
        assert says in error["message"]


@pytest.mark.parametrize(
    ("more", "param", "says"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function", "Missing"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].custom", "Unknown"),
        ({"tools": [tool("two words")]}, "tools[0].function.name", "pattern"),
        ({"tools": [tool("f"), tool("f")]}, "tools[1].function.name", "rename"),
        ({"tools": [tool("f", {"type": "array"})]}, "tools[0].function.parameters", "object"),
        ({"tools": [tool("f", {"a": "x" * 70_000})]}, "tools[0].function.parameters", "bytes"),
        ({"tools": [tool("f", strikt=True)]}, "tools[0].function.strikt", "Unknown"),
        ({"tools": [tool(f"f{k}") for k in range(129)]}, "tools", "128"),
        ({"tools": [tool(f"f{k}", {"a": "x" * 60_000}) for k in range(5)]}, "tools", "bytes"),
        ({"tool_choice": "required"}, "tool_choice", "tools"),
        ({"tools": [], "tool_choice": NAMED}, "tool_choice", "tools"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice", "required"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice.function", "required"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}},
            "tool_choice.function.name",
            "get_weather",
        ),
        (
            {"tools": TOOLS, "tool_choice": allowed("auto", "get_time", "f")},
            "tool_choice.allowed_tools.tools[1].function.name",
            "get_time",
        ),
        ({"tools": TOOLS, "parallel_tool_calls": "no"}, "parallel_tool_calls", "boolean"),
        ({"functions": [{"name": "f"}]}, "functions", "tools"),
        ({"function_call": "auto"}, "function_call", "tool_choice"),
    ],
)
async def test_a_bad_tool_is_named(make_door, more: dict, param: str, says: str) -> None:
    door = await make_door(ScriptedReplica("a"))
    async with in_process(create_app(door)) as client:
        error = error_of(await client.post("/v1/chat/completions", json=CHAT | more), 400)
        assert error["param"] == param
        assert says in error["message"]


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "content": None, "tool_calls": []}, "content"),
        ({"role": "user", "content": "x", "tool_calls": [sent("{}")]}, "tool_calls"),
        ({"role": "assistant", "tool_calls": [sent("[1]")]}, "tool_calls[0].function.arguments"),
        ({"role": "assistant", "tool_calls": [sent("{")]}, "tool_calls[0].function.arguments"),
        ({"role": "assistant", "tool_calls": [sent("{}", id=None)]}, "tool_calls[0].id"),
        ({"role": "tool", "content": "x"}, "tool_call_id"),
        ({"role": "tool", "tool_call_id": "a"}, "content"),
        ({"role": "function", "content": "x"}, "name"),
    ],
)
async def test_a_bad_history_is_named(make_door, message: dict, param: str) -> None:
    door = await make_door(ScriptedReplica("a"))
    async with in_process(create_app(door)) as client:
        body = CHAT | {"messages": [*CHAT["messages"], message]}
        error = error_of(await client.post("/v1/chat/completions", json=body), 400)
        assert error["param"] == f"messages[1].{param}"


@pytest.mark.parametrize("choice", ["auto", "none"])
@pytest.mark.parametrize("tools", [{}, {"tools": []}, {"tools": None}])
async def test_without_tools_a_choice_that_asks_for_no_call_is_taken(
    make_door, choice: str, tools: dict
) -> None:
    replica = ScriptedReplica("a")
    door = await make_door(replica)
    async with running(replica.run()), in_process(create_app(door)) as client:
        response = await client.post("/v1/chat/completions", json=CHAT | tools | {"tool_choice": choice})
        assert response.status_code == 200, response.text
    assert replica.submitted[0].sampling.tools is None


async def test_hints_to_caches_and_long_names_are_taken(make_door) -> None:
    hint = {"cache_control": {"type": "ephemeral"}}
    long = tool("n" * 128, **hint) | hint
    replica = ScriptedReplica("a")
    door = await make_door(replica)
    async with running(replica.run()), in_process(create_app(door)) as client:
        body = CHAT | {"tools": [long], "messages": [{"role": "user", "content": "x"} | hint]}
        response = await client.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        longer = CHAT | {"tools": [tool("n" * 129)]}
        error = error_of(await client.post("/v1/chat/completions", json=longer), 400)
        assert error["param"] == "tools[0].function.name"
    (asked,) = replica.submitted[0].sampling.tools.tools
    assert (asked.name, asked.parameters) == ("n" * 128, json.dumps(TIME))
    assert replica.submitted[0].prompts == (({"role": "user", "content": "x"},),)


async def test_what_is_asked_reaches_the_replica(make_door) -> None:
    replica = ScriptedReplica("a")
    door = await make_door(replica)
    async with running(replica.run()), in_process(create_app(door)) as client:
        body = CHAT | {
            "tools": TOOLS,
            "tool_choice": allowed("auto", "get_time"),
            "parallel_tool_calls": False,
        }
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
        none = CHAT | {"tools": TOOLS, "tool_choice": "none"}
        assert (await client.post("/v1/chat/completions", json=none)).status_code == 200
    first, second = (request.sampling.tools for request in replica.submitted)
    assert [each.name for each in first.tools] == ["get_weather", "get_time"]
    assert (first.callable, first.is_required, first.is_parallel) == ({"get_time"}, False, False)
    assert [each.strict for each in first.tools] == [False, True]
    assert json.loads(first.tools[0].parameters) == WEATHER
    assert second is None
