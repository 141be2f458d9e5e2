"""OpenAI's SDK for Python: chats, text completions, Responses."""

import json

import jsonschema
import openai
import pytest

from tests.clients.asked import CALL_ID, FUNCTION, MODEL, SCHEMA, SORT, SORTED, TOOL, WEATHER, Report

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": SORT}], "temperature": 0}
CALLED = [
    {"role": "user", "content": WEATHER},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": CALL_ID,
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"unit": "C", "days": 2}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": CALL_ID, "content": "rain"},
]


@pytest.fixture
def client(base_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=base_url, api_key="none", max_retries=0)


def test_chat(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(**CHAT, n=2, logprobs=True, top_logprobs=2)
    assert [choice.message.content for choice in chat.choices] == [SORTED] * 2
    assert chat.choices[0].finish_reason == "stop"
    assert chat.usage.total_tokens == chat.usage.prompt_tokens + chat.usage.completion_tokens
    assert "".join(entry.token for entry in chat.choices[0].logprobs.content).startswith(SORTED)
    assert "," not in chat._request_id
    assert [model.id for model in client.models.list()] == [MODEL]


def test_chat_streamed(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True})
    *chunks, last = stream
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == SORTED
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert last.usage.completion_tokens > 1
    with client.chat.completions.stream(**CHAT) as helper:
        assert next(event for event in helper if event.type == "content.done").content == SORTED


async def test_chat_of_the_async_client(base_url: str) -> None:
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none") as client:
        chat = await client.chat.completions.create(**CHAT)
        assert chat.choices[0].message.content == SORTED


def test_parsed_answers(client: openai.OpenAI) -> None:
    chat = client.chat.completions.parse(**CHAT, response_format=Report)
    assert isinstance(chat.choices[0].message.parsed, Report)
    response = client.responses.parse(model=MODEL, input=WEATHER, text_format=Report)
    assert isinstance(response.output_parsed, Report)


@pytest.mark.parametrize(
    "choice",
    ["required", {"type": "function", "function": {"name": "get_weather"}}],
    ids=["required", "named"],
)
@pytest.mark.parametrize("parallel", [True, False])
def test_forced_calls(client: openai.OpenAI, choice: object, parallel: bool) -> None:
    body = CHAT | {"tools": [TOOL], "tool_choice": choice, "parallel_tool_calls": parallel, "max_tokens": 200}
    (whole,) = client.chat.completions.create(**body).choices
    assert (whole.finish_reason, whole.message.content) == ("tool_calls", None)
    with client.chat.completions.stream(**body) as stream:
        events = list(stream)
    (streamed,) = stream.get_final_completion().choices
    for calls in (whole.message.tool_calls, streamed.message.tool_calls):
        assert calls[0].function.name == "get_weather"
        for call in calls:
            jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
    assert any(event.type == "tool_calls.function.arguments.delta" for event in events)
    assert [call.function.arguments for call in streamed.message.tool_calls] == [
        call.function.arguments for call in whole.message.tool_calls
    ]


def test_tools_that_need_not_be_called(client: openai.OpenAI) -> None:
    for choice in ("auto", "none"):
        body = CHAT | {"tools": [TOOL], "tool_choice": choice, "max_tokens": 60}
        (answered,) = client.chat.completions.create(**body).choices
        assert answered.message.content or answered.message.tool_calls
        assert choice == "auto" or answered.message.tool_calls is None


def test_a_history_with_a_call(client: openai.OpenAI) -> None:
    for tools in ({}, {"tools": [TOOL]}):
        (answered,) = client.chat.completions.create(
            model=MODEL, messages=CALLED, max_tokens=20, **tools
        ).choices
        assert answered.finish_reason in ("stop", "length", "tool_calls")


def test_text_completions(client: openai.OpenAI) -> None:
    plain = client.completions.create(model=MODEL, prompt=["Once", [5, 6, 7]], temperature=0, logprobs=1)
    assert [choice.index for choice in plain.choices] == [0, 1]
    assert plain.usage.completion_tokens <= 32
    echo = client.completions.create(model=MODEL, prompt="Once", max_tokens=0, echo=True, logprobs=1)
    assert echo.choices[0].text == "Once"
    assert echo.choices[0].logprobs.token_logprobs[0] is None
    chunks = client.completions.create(model=MODEL, prompt="Once", temperature=0, logprobs=1, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == plain.choices[0].text


def test_responses(client: openai.OpenAI) -> None:
    body = {"model": MODEL, "input": SORT, "temperature": 0}
    whole = client.responses.create(**body)
    assert (whole.status, whole.output_text) == ("completed", SORTED)
    with client.responses.stream(**body) as stream:
        kinds = [event.type for event in stream]
    assert stream.get_final_response().output_text == SORTED
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
    again = client.responses.create(
        model=MODEL,
        input=[{"role": "user", "content": SORT}, *whole.output, {"role": "user", "content": "Again."}],
        max_output_tokens=16,
    )
    assert again.status in ("completed", "incomplete")


def test_a_call_of_the_responses_and_its_result(client: openai.OpenAI) -> None:
    body = {"model": MODEL, "tools": [{"type": "function", "strict": True, **FUNCTION}]}
    asked = [{"role": "user", "content": WEATHER}]
    forced = client.responses.create(
        **body, input=asked, tool_choice="required", parallel_tool_calls=False, max_output_tokens=100
    )
    (call,) = [item for item in forced.output if item.type == "function_call"]
    jsonschema.validate(json.loads(call.arguments), SCHEMA)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    answered = client.responses.create(**body, input=[*asked, call, result], tool_choice="none")
    assert [item.type for item in answered.output] == ["message"]


def test_errors_have_their_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(**CHAT | {"model": "gpt"})
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "7, " * 5000}])
    assert long.value.code == "context_length_exceeded"
