"""LiteLLM's SDK: its OpenAI and vLLM providers, and its bridges to other APIs."""

import json

import jsonschema
import litellm
import pytest

from tests.clients.asked import MODEL, SCHEMA, SORT, SORTED, TOOL, WEATHER, Report

SORTING = {"messages": [{"role": "user", "content": SORT}], "temperature": 0}
ASKED = [{"role": "user", "content": WEATHER}]


@pytest.fixture(params=["openai", "hosted_vllm"])
def through(request: pytest.FixtureRequest, base_url: str) -> dict[str, object]:
    return {"model": f"{request.param}/{MODEL}", "api_base": base_url, "api_key": "none", "num_retries": 0}


def test_chat(through: dict[str, object]) -> None:
    whole = litellm.completion(**through, **SORTING)
    assert whole.choices[0].message.content == SORTED
    chunks = list(litellm.completion(**through, **SORTING, stream=True))
    built = litellm.stream_chunk_builder(chunks, messages=SORTING["messages"])
    assert built.choices[0].message.content == SORTED


async def test_chat_async(through: dict[str, object]) -> None:
    assert (await litellm.acompletion(**through, **SORTING)).choices[0].message.content == SORTED


def test_a_forced_call_and_its_result(through: dict[str, object]) -> None:
    whole = litellm.completion(
        **through, messages=ASKED, tools=[TOOL], tool_choice="required", parallel_tool_calls=False
    )
    message = whole.choices[0].message
    (call,) = message.tool_calls
    jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    answered = litellm.completion(
        **through, messages=[*ASKED, message, result], tools=[TOOL], tool_choice="none", max_tokens=20
    )
    assert answered.choices[0].message.tool_calls is None
    chunks = list(
        litellm.completion(**through, messages=ASKED, tools=[TOOL], tool_choice="required", stream=True)
    )
    (streamed, *_) = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls
    jsonschema.validate(json.loads(streamed.function.arguments), SCHEMA)


def test_a_schema(through: dict[str, object]) -> None:
    answered = litellm.completion(**through, messages=ASKED, response_format=Report)
    Report.model_validate_json(answered.choices[0].message.content)


def test_hints_and_cache_control(through: dict[str, object]) -> None:
    part = {"type": "text", "text": SORT, "cache_control": {"type": "ephemeral"}}
    answered = litellm.completion(
        **through, messages=[{"role": "user", "content": [part]}], reasoning_effort="low", temperature=0
    )
    assert answered.choices[0].message.content == SORTED


def test_a_prompt_too_long_is_known_as_one(through: dict[str, object]) -> None:
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**through, messages=[{"role": "user", "content": "7, " * 5000}])


def test_text_completions(base_url: str) -> None:
    answered = litellm.text_completion(
        model=f"text-completion-openai/{MODEL}",
        prompt="Once",
        max_tokens=5,
        api_base=base_url,
        api_key="none",
    )
    assert answered.usage.completion_tokens <= 5


def test_responses(through: dict[str, object]) -> None:
    answered = litellm.responses(**through, input=SORT, temperature=0)
    assert answered.output[-1].content[0].text == SORTED


async def test_the_bridge_from_anthropic(through: dict[str, object]) -> None:
    answered = await litellm.anthropic.messages.acreate(
        **through, messages=[{"role": "user", "content": SORT}], max_tokens=60, temperature=0
    )
    assert answered["content"][-1]["text"] == SORTED
