"""Haystack: chats with names, streams, tools and an agent."""

import json

import jsonschema
from haystack.components.agents import Agent
from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage, StreamingChunk
from haystack.tools import Tool
from haystack.utils import Secret

from tests.clients.asked import MODEL, SCHEMA, SORT, SORTED, WEATHER, Report, get_weather

TOOL = Tool("get_weather", "Get the weather.", SCHEMA, get_weather)


def generator(base_url: str, **generation: object) -> OpenAIChatGenerator:
    return OpenAIChatGenerator(
        api_key=Secret.from_token("none"),
        model=MODEL,
        api_base_url=base_url,
        generation_kwargs={"temperature": 0} | generation,
    )


def test_text(base_url: str) -> None:
    asked = [ChatMessage.from_user(SORT)]
    (whole,) = generator(base_url).run(asked)["replies"]
    assert whole.text == SORTED
    chunks: list[StreamingChunk] = []
    (streamed,) = generator(base_url).run(asked, streaming_callback=chunks.append)["replies"]
    assert streamed.text == "".join(chunk.content for chunk in chunks) == SORTED


def test_a_message_may_have_a_name(base_url: str) -> None:
    asked = [ChatMessage.from_user(SORT, name="ada")]
    assert generator(base_url).run(asked)["replies"][0].text == SORTED


def test_a_typed_answer(base_url: str) -> None:
    (told,) = generator(base_url, response_format=Report).run([ChatMessage.from_user(WEATHER)])["replies"]
    Report.model_validate_json(told.text)


def test_a_forced_call_and_its_result(base_url: str) -> None:
    asked = [ChatMessage.from_user(WEATHER)]
    chunks: list[StreamingChunk] = []
    for callback in (None, chunks.append):
        forced = generator(base_url, tool_choice="required")
        (told,) = forced.run(asked, tools=[TOOL], streaming_callback=callback)["replies"]
        for call in told.tool_calls:
            jsonschema.validate(call.arguments, SCHEMA)
    results = [ChatMessage.from_tool("rain", origin=call) for call in told.tool_calls]
    (answer,) = generator(base_url, max_tokens=20).run([*asked, told, *results])["replies"]
    assert answer.text is not None
    assert json.dumps(answer.meta["usage"])


def test_an_agent_has_its_tool_run(base_url: str) -> None:
    agent = Agent(
        chat_generator=generator(base_url, tool_choice="required"),
        tools=[TOOL],
        exit_conditions=["get_weather"],
    )
    told = agent.run(messages=[ChatMessage.from_user(WEATHER)])
    assert "days of rain" in told["messages"][-1].tool_call_results[0].result
