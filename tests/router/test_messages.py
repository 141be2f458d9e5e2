"""Anthropic's Messages over HTTP, by its own client and shape by shape."""

import asyncio
import json
from typing import Any

import anthropic
import pytest

from replicas.answer_forms import ThinkingBudget
from replicas.errors import ErrorCode
from replicas.messages import TemplateOptions
from replicas.text import TextCodec
from router.api import create_app
from router.apis.messages_schema import CountTokensRequest, MessageParam, MessagesRequest
from router.auth import ApiKey, KeyRing, digest_of
from tests.eventually import eventually
from tests.replicas.codec import byte_codec
from tests.router.conftest import in_process, over_http, running
from tests.router.fakes import MODEL, TEXT, WORDS, ScriptedReplica
from tests.router.stack import a_stack
from tests.router.test_tools import SCHEMAS, WEATHER, checked, codec, runner

__all__ = ["checked", "codec", "runner"]

ASKED = {"role": "user", "content": "How is the weather in Oslo?"}
BODY: dict[str, Any] = {"model": MODEL, "max_tokens": 120, "messages": [ASKED]}
TOOLS = [
    {"name": "get_weather", "input_schema": WEATHER, "description": "How it is.", "cache_control": {}},
    {"name": "get_time", "type": "custom", "input_schema": SCHEMAS["get_time"], "strict": True},
]
CALLED = {
    "role": "assistant",
    "content": [
        {"type": "thinking", "thinking": "Hm.", "signature": ""},
        {"type": "redacted_thinking", "data": "x"},
        {"type": "text", "text": "Let me "},
        {"type": "text", "text": "see."},
        {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Oslo"}},
    ],
}
RESULTS = {
    "role": "user",
    "content": [
        {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "Sunny."}]},
        {"type": "tool_result", "tool_use_id": "toolu_2", "content": "no", "is_error": True},
        {"type": "tool_result", "tool_use_id": "toolu_3"},
        {"type": "text", "text": "So?", "cache_control": {"type": "ephemeral"}},
    ],
}


def error_of(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert (set(body), body["type"]) == ({"type", "error"}, "error")
    assert set(body["error"]) == {"type", "message"}
    return body["error"]


def a_client(url: str, key: str = "any") -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=url, api_key=key, max_retries=0)


async def test_messages_as_the_anthropic_client_takes_them(make_door) -> None:
    replica = ScriptedReplica("a")
    door = await make_door(replica)
    async with running(replica.run()), over_http(create_app(door)) as url:
        client = a_client(url)
        whole = await client.messages.create(**BODY)
        (block,) = whole.content
        assert (block.type, block.text) == ("text", TEXT)
        assert (whole.stop_reason, whole.stop_sequence, whole.role) == ("end_turn", None, "assistant")
        assert (whole.usage.input_tokens, whole.usage.output_tokens) == (5, len(WORDS))
        assert whole.decoding["tokens_per_forward"] == 1.2
        assert whole.id.startswith("msg_")

        async with client.messages.stream(**BODY) as stream:
            names = [event.type async for event in stream]
            final = await stream.get_final_message()
        assert (names[0], names[-1]) == ("message_start", "message_stop")
        assert (final.content[0].text, final.stop_reason) == (TEXT, "end_turn")
        assert final.usage.output_tokens == len(WORDS)
        assert (await client.messages.count_tokens(model=MODEL, messages=[ASKED])).input_tokens > 5
        with pytest.raises(anthropic.NotFoundError, match="gpt"):
            await client.messages.create(**BODY | {"model": "gpt"})
        with pytest.raises(anthropic.BadRequestError, match="temperature"):
            await client.messages.create(**BODY, extra_body={"temperature": 3.0})


async def test_calls_as_the_anthropic_client_takes_them(runner: Any, codec: TextCodec) -> None:
    async with a_stack([runner], codec=codec) as stack, over_http(create_app(stack.door)) as url:
        client = a_client(url)
        body = BODY | {"tools": TOOLS, "extra_body": {"temperature": 0}}
        for choice in ({"type": "tool", "name": "get_weather"}, {"type": "any"}):
            asked = body | {"tool_choice": choice | {"disable_parallel_tool_use": True}}
            whole = await client.messages.create(**asked)
            (call,) = whole.content
            assert (whole.stop_reason, call.type) == ("tool_use", "tool_use")
            assert call.id.startswith("toolu_")
            assert choice["type"] == "any" or set(call.input) == {"city", "unit", "days"}
            async with client.messages.stream(**asked) as stream:
                final = await stream.get_final_message()
            (again,) = final.content
            assert (again.name, again.input, final.stop_reason) == (call.name, call.input, "tool_use")

        history = [ASKED, CALLED, RESULTS]
        for more in ({"tools": TOOLS}, {"system": "Be brief."}, {"system": [{"type": "text", "text": "Be"}]}):
            asked = BODY | {"messages": history, "max_tokens": 3} | more
            usage = (await client.messages.create(**asked)).usage
            counted = await client.messages.count_tokens(
                **{name: value for name, value in asked.items() if name != "max_tokens"}
            )
            assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
        await stack.settled()


async def test_decoding_and_the_end_of_a_text(runner: Any, codec: TextCodec) -> None:
    async with a_stack([runner], codec=codec) as stack, in_process(create_app(stack.door)) as client:
        body = BODY | {"temperature": 0, "max_tokens": 12}
        for mode in ("ar", "diffusion", "self_speculation"):
            answer = (await client.post("/v1/messages", json=body | {"decoding": {"mode": mode}})).json()
            assert set(answer["decoding"]["tokens"]) == {mode}
            assert answer["usage"]["output_tokens"] == 12
            assert answer["stop_reason"] == "max_tokens"
        text = (await client.post("/v1/messages", json=body | {"decoding": {"mode": "ar"}})).json()
        stop = text["content"][0]["text"][3:6]
        more = {"stop_sequences": [stop], "decoding": {"mode": "ar"}}
        answer = (await client.post("/v1/messages", json=body | more)).json()
        assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", stop)
        schema = {"type": "json_schema", "schema": WEATHER}
        more = {"output_config": {"format": schema}, "max_tokens": 120}
        answer = (await client.post("/v1/messages", json=body | more)).json()
        assert set(json.loads(answer["content"][0]["text"])) == {"city", "unit", "days"}


async def test_what_is_asked_reaches_the_replica(make_door) -> None:
    replica = ScriptedReplica("a")
    door = await make_door(replica)
    async with running(replica.run()), in_process(create_app(door)) as client:
        more = {
            "system": [
                {"type": "text", "text": "Be ", "cache_control": {}},
                {"type": "text", "text": "brief."},
            ],
            "messages": [ASKED, CALLED, RESULTS],
            "tools": TOOLS,
            "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
            "stop_sequences": ["END"],
            "top_k": 3,
            "top_p": 0.5,
            "seed": 7,
            "thinking": {"type": "enabled", "budget_tokens": 1024},
            "metadata": {"user_id": "u"},
            "cache_control": {"type": "ephemeral"},
        }
        response = await client.post("/v1/messages", json=BODY | more)
        assert response.status_code == 200, response.text
    (sent,) = replica.submitted
    call = {"id": "toolu_1", "type": "function"}
    call |= {"function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
    told = {"role": "assistant", "content": "Let me see.", "reasoning_content": "Hm.", "tool_calls": [call]}
    assert sent.prompts == (
        (
            {"role": "system", "content": "Be brief."},
            ASKED,
            told,
            {"role": "tool", "tool_call_id": "toolu_1", "content": "Sunny."},
            {"role": "tool", "tool_call_id": "toolu_2", "content": "Error: no"},
            {"role": "tool", "tool_call_id": "toolu_3", "content": ""},
            {"role": "user", "content": "So?"},
        ),
    )
    sampling = sent.sampling
    assert (sampling.stop, sampling.top_k, sampling.top_p, sampling.seed) == (("END",), 3, 0.5, 7)
    assert (sampling.tools.is_required, sampling.tools.is_parallel) == (True, False)
    assert sampling.thinking_token_budget == ThinkingBudget(1024, needs_marks=False)
    assert json.loads(sent.template.kwargs) == {"enable_thinking": True}


def messages_of(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


ANSWER = [
    {"type": "thinking", "thinking": "Hm.", "signature": ""},
    {"type": "text", "text": "It is ("},
]


@pytest.mark.parametrize(
    ("messages", "continues"),
    [
        (messages_of(("user", "a"), ("assistant", "It is (")), True),
        (messages_of(("user", "a"), ("assistant", ANSWER)), True),
        (messages_of(("user", "a"), ("assistant", ANSWER[:1]), ("assistant", ANSWER[1:])), True),
        (messages_of(("user", "a"), ("assistant", ANSWER[:1])), False),
        (messages_of(("user", "a"), ("assistant", " \n")), False),
        (messages_of(("user", "a"), ("assistant", [])), False),
        ([ASKED, CALLED], False),
        ([ASKED, CALLED, {"role": "assistant", "content": "It is ("}], False),
        ([ASKED, {"role": "assistant", "content": "It is ("}, {"role": "system", "content": "b"}], False),
        ([ASKED, {"role": "assistant", "content": "It is ("}, ASKED], False),
    ],
)
def test_an_answer_goes_on_with_an_assistants_last_text(messages: list[Any], continues: bool) -> None:
    expected = TemplateOptions(add_generation_prompt=not continues, continue_final_message=continues)
    assert MessagesRequest.model_validate(BODY | {"messages": messages}).chat.template == expected
    assert CountTokensRequest.model_validate({"messages": messages}).chat.template == expected


ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "[{{ m.role }}]{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
WRITTEN = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("messages", "prompt"),
    [
        (messages_of(("user", "a"), ("user", ""), ("user", "b")), "[user]a\n\nb[assistant]"),
        (messages_of(("user", "a"), ("assistant", ANSWER)), "[user]a[assistant](Hm.)It is ("),
        (
            messages_of(("user", "a"), ("assistant", ANSWER), ("assistant", ANSWER), ("user", "b")),
            "[user]a[assistant](Hm.\n\nHm.)It is (\n\nIt is ([user]b[assistant]",
        ),
        (
            [*messages_of(("user", "a"), ("assistant", "Well.")), CALLED, RESULTS],
            f"[user]a[assistant](Hm.)Well.\n\nLet me see.\n{WRITTEN}[user]<tool_response>\nSunny.\n"
            "</tool_response>\n<tool_response>\nError: no\n</tool_response>\n<tool_response>\n\n"
            "</tool_response>\nSo?[assistant]",
        ),
        (
            [ASKED, CALLED, CALLED | {"content": CALLED["content"][-1:]}, *messages_of(("user", "b"))],
            f"[user]{ASKED['content']}[assistant](Hm.)Let me see.\n{WRITTEN}\n{WRITTEN}[user]b[assistant]",
        ),
    ],
)
def test_messages_of_one_role_in_a_row_are_one_turn(messages: list[Any], prompt: str) -> None:
    codec = byte_codec(ALTERNATING)
    chat = MessagesRequest.model_validate(BODY | {"messages": messages}).chat
    (told,) = chat.prompts_for_replica()
    assert codec.decode(codec.encode(told, template=chat.template)) == prompt


def test_blocks_by_the_thousand_are_joined() -> None:
    for block in ({"type": "text", "text": "ab"}, {"type": "thinking", "thinking": "ab"}):
        message = MessageParam(role="assistant", content=[block] * 20_000)
        (found,) = message.chat_messages()
        key = "content" if "text" in block else "reasoning_content"
        assert found == {"role": "assistant", "content": "", key: "ab" * 20_000}


CLEARED = {"type": "clear_thinking_20251015"}


@pytest.mark.parametrize(
    "more",
    [
        {"tools": [TOOLS[0] | {"allowed_callers": ["direct"], "defer_loading": False}]},
        {"context_management": {"edits": [CLEARED | {"keep": "all"}]}},
        {"context_management": {"edits": [CLEARED | {"keep": {"type": "all"}}]}},
        {"context_management": {"edits": []}},
        {"thinking": {"type": "adaptive", "display": "omitted"}, "output_config": {"effort": "xhigh"}},
        {"cache_control": {"type": "ephemeral", "ttl": "1h"}},
        {"speed": "standard", "service_tier": "auto", "inference_geo": "eu", "diagnostics": {}},
    ],
)
async def test_what_asks_for_nothing_is_taken(make_door, more: dict[str, Any]) -> None:
    """What Anthropic's clients send of late, by values that ask for what is done anyway."""
    replica = ScriptedReplica("a")
    async with running(replica.run()), in_process(create_app(await make_door(replica))) as client:
        response = await client.post("/v1/messages", json=BODY | more)
        assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"max_tokens": None}, "'max_tokens'"),
        ({"messages": []}, "'messages'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "'messages[0].role'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "'messages[0].content[0]'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "'messages[0].content[0].text'"),
        (
            {"messages": [ASKED, RESULTS | {"role": "assistant"}, CALLED | {"role": "user"}]},
            "'messages[2].content'",
        ),
        ({"system": 3}, "'system'"),
        ({"system": "\ud800"}, "'system'"),
        ({"system": [{"type": "text", "text": "\ud800"}]}, "'system[0].text'"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "'messages[0].content'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}]},
            "'messages[0].content[0].text'",
        ),
        (
            {
                "messages": [
                    ASKED,
                    {"role": "user", "content": [{**RESULTS["content"][1], "content": "\ud800"}]},
                ]
            },
            "'messages[1].content[0].content'",
        ),
        ({"messages": [ASKED, CALLED | {"role": "user"}]}, "'messages[1].content'"),
        (
            {
                "messages": [
                    {"role": "assistant", "content": "x"},
                    CALLED | {"content": [CALLED["content"][-1] | {"name": "f g"}]},
                ]
            },
            "'messages[1].content[0].name'",
        ),
        ({"tools": [{"name": "two words", "input_schema": {}}]}, "'tools[0].name'"),
        ({"tools": [{"name": "f", "input_schema": {"type": "array"}}]}, "'tools[0].input_schema'"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "'tools[0]'"),
        ({"tool_choice": {"type": "any"}}, "'tool_choice'"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "f"}}, "'tool_choice'"),
        ({"stop_sequences": ["x"] * 17}, "'stop_sequences'"),
        ({"top_k": -1}, "'top_k'"),
        ({"thinking": {"type": "always"}}, "'thinking.type'"),
        ({"thinking": {"type": "disabled", "budget_tokens": 9}}, "'thinking.budget_tokens'"),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "'thinking.budget_tokens'"),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 9}, "thinking_token_budget": 9},
            "'thinking_token_budget'",
        ),
        ({"decoding": {"mode": "ar", "block_length": 4}}, "'decoding"),
        ({"container": "x"}, "'container'"),
        ({"tools": [TOOLS[0] | {"defer_loading": True}]}, "'tools[0].defer_loading'"),
        (
            {"tools": [TOOLS[0] | {"allowed_callers": ["code_execution_20260120"]}]},
            "'tools[0].allowed_callers'",
        ),
        ({"thinking": {"type": "enabled", "display": "brief"}}, "'thinking.display'"),
        (
            {"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}},
            "'context_management.edits[0]'",
        ),
        (
            {"context_management": {"edits": [CLEARED | {"keep": {"type": "thinking_turns", "value": 1}}]}},
            "'context_management.edits[0].keep'",
        ),
        ({"context_management": {"edits": [CLEARED]}}, "'context_management.edits[0].keep'"),
        ({"output_config": {"task_budget": {"type": "tokens", "total": 9}}}, "'output_config.task_budget'"),
        ({"max_completion_tokens": 3}, "'max_completion_tokens'"),
    ],
)
async def test_what_is_wrong_is_named(make_door, more: dict[str, Any], says: str) -> None:
    async with in_process(create_app(await make_door(ScriptedReplica("a")))) as client:
        body = {name: value for name, value in (BODY | more).items() if value is not None}
        # Not by httpx's own encoder, which writes no lone surrogate.
        sent = {"content": json.dumps(body), "headers": {"content-type": "application/json"}}
        error = error_of(await client.post("/v1/messages", **sent), 400)
        assert error["type"] == "invalid_request_error"
        assert says in error["message"]


async def test_errors_have_anthropics_form(make_door) -> None:
    replica = ScriptedReplica("a")
    keys = KeyRing((ApiKey("me", digest_of("secret")),))
    app = create_app(await make_door(replica, keys=keys))
    async with in_process(app) as client:
        assert error_of(await client.post("/v1/messages", json=BODY), 401)["type"] == "authentication_error"
        client.headers["x-api-key"] = "wrong"
        error_of(await client.post("/v1/messages", json=BODY), 401)
        client.headers["x-api-key"] = "secret"
        assert (await client.get("/v1/models")).status_code == 200
        assert error_of(await client.get("/v1/messages/batches"), 404)["type"] == "not_found_error"
        error_of(await client.get("/v1/messages"), 405)
        error_of(await client.post("/v1/messages", content=b"{"), 400)
        replica.refusal = ErrorCode.QUEUE_FULL, "full"
        assert error_of(await client.post("/v1/messages", json=BODY), 429)["type"] == "rate_limit_error"
        replica.refusal = ErrorCode.INVALID_REQUEST, "no"
        for path in ("/v1/messages", "/v1/messages/count_tokens"):
            body = {"model": MODEL, "messages": [ASKED]} | ({} if "count" in path else {"max_tokens": 1})
            assert error_of(await client.post(path, json=body), 400)["message"] == "no"
    async with in_process(create_app(await make_door())) as client:
        assert error_of(await client.post("/v1/messages", json=BODY), 503)["type"] == "overloaded_error"


async def test_a_stream_that_breaks_ends_with_one_error(make_door) -> None:
    replica = ScriptedReplica("a")
    door = await make_door(replica)
    async with in_process(create_app(door)) as client:
        asking = asyncio.create_task(client.post("/v1/messages", json=BODY | {"stream": True}))
        await eventually(lambda: len(replica.live) == 1)
        (request_id,) = replica.live
        replica.step(request_id)
        await eventually(lambda: door.dispatcher.num_in_flight == 1)
        replica.fail(request_id, ErrorCode.INTERNAL, "the forward failed")
        *_, last = [part for part in (await asking).text.split("\n\n") if part]
    name, data = last.split("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: ")) == {
        "type": "error",
        "error": {"type": "api_error", "message": "the forward failed"},
    }


async def test_a_client_that_goes_is_noticed(make_door) -> None:
    replica = ScriptedReplica("a")
    door = await make_door(replica)
    async with over_http(create_app(door)) as url:
        asking = asyncio.create_task(a_client(url).messages.create(**BODY, stream=True))
        await eventually(lambda: len(replica.live) == 1)
        (request_id,) = replica.live
        replica.step(request_id)
        await (await asking).close()
        await eventually(lambda: replica.cancelled == [request_id])
