"""Anthropic's SDK for Python."""

import anthropic
import jsonschema
import pytest

from tests.clients.asked import FUNCTION, MODEL, SCHEMA, SORT, SORTED, WEATHER, Report

TOOL = {"name": "get_weather", "description": FUNCTION["description"], "input_schema": SCHEMA}
SORTING = {
    "model": MODEL,
    "max_tokens": 40,
    "temperature": 0,
    "messages": [{"role": "user", "content": SORT}],
}
ASKED = [{"role": "user", "content": WEATHER}]


@pytest.fixture
def client(server: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server, api_key="none", max_retries=0)


def greedy(temperature: int, **body: object) -> dict[str, object]:
    """The body in the form of an SDK that has no temperature any more."""
    return {**body, "extra_body": {"temperature": temperature}}


def test_messages(client: anthropic.Anthropic) -> None:
    message = client.messages.create(**greedy(**SORTING))
    assert (message.content[0].text, message.stop_reason) == (SORTED, "end_turn")
    with client.messages.stream(**greedy(**SORTING)) as stream:
        assert "".join(stream.text_stream) == SORTED
        assert stream.get_final_message().usage.output_tokens == message.usage.output_tokens
    counted = client.messages.count_tokens(model=MODEL, messages=SORTING["messages"])
    usage = message.usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


def test_blocks_of_a_system_prompt_with_cache_control(client: anthropic.Anthropic) -> None:
    cached = {"type": "ephemeral"}
    system = [{"type": "text", "text": "Be brief.", "cache_control": cached}]
    content = [{"type": "text", "text": SORT, "cache_control": cached}]
    message = client.messages.create(
        model=MODEL, max_tokens=40, system=system, messages=[{"role": "user", "content": content}]
    )
    assert message.content[0].type == "text"


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_a_forced_call_and_its_result(client: anthropic.Anthropic, choice: dict[str, object]) -> None:
    body = {"model": MODEL, "tools": [TOOL], "max_tokens": 100}
    forced = choice | {"disable_parallel_tool_use": True}
    message = client.messages.create(**body, messages=ASKED, tool_choice=forced)
    (call,) = message.content
    assert (call.name, message.stop_reason) == ("get_weather", "tool_use")
    jsonschema.validate(call.input, SCHEMA)
    with client.messages.stream(**body, messages=ASKED, tool_choice=forced) as stream:
        (streamed,) = stream.get_final_message().content
    jsonschema.validate(streamed.input, SCHEMA)
    results = [{"type": "tool_result", "tool_use_id": call.id, "content": "rain"}]
    history = [
        *ASKED,
        {"role": "assistant", "content": message.content},
        {"role": "user", "content": results},
    ]
    answered = client.messages.create(**body, messages=history, tool_choice={"type": "none"})
    assert answered.content[0].type == "text"
    assert client.messages.create(**body, messages=history).content


def test_parsed_answers(client: anthropic.Anthropic) -> None:
    message = client.messages.parse(model=MODEL, max_tokens=100, messages=ASKED, output_format=Report)
    assert isinstance(message.parsed_output, Report)


def test_errors_have_their_classes(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="claude", max_tokens=4, messages=ASKED)
    with pytest.raises(anthropic.BadRequestError):
        client.messages.create(
            model=MODEL, max_tokens=4, messages=[{"role": "user", "content": "7, " * 5000}]
        )
