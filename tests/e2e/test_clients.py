"""Clients of the other APIs, unmodified, against a real server."""

import json

import anthropic
import httpx
import openai
import pytest

from tests.e2e.clients import MODEL
from tests.e2e.host import Host

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

PROMPT = "Sort these numbers from small to large: 41, 7, 23, 5, 98."
UNIT = {
    "type": "object",
    "properties": {"unit": {"enum": ["C", "F"]}},
    "required": ["unit"],
    "additionalProperties": False,
}
AR = {"decoding": {"mode": "ar"}}


async def test_each_api_gives_the_same_text_and_the_same_call(server: Host) -> None:
    chats = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    messages = anthropic.AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0)
    asked = [{"role": "user", "content": PROMPT}]
    more = {"temperature": 0, "max_tokens": 20}

    chat = await chats.chat.completions.create(model=MODEL, messages=asked, **more, extra_body=AR)
    text = chat.choices[0].message.content
    response_body = {"model": MODEL, "input": PROMPT, "temperature": 0, "max_output_tokens": 20}
    assert (await chats.responses.create(**response_body, extra_body=AR)).output_text == text
    async with chats.responses.stream(**response_body, extra_body=AR) as stream:
        *_, last = [event async for event in stream]
    assert (last.type, last.response.output_text) == ("response.incomplete", text)
    message_body = {"model": MODEL, "messages": asked, "max_tokens": 20}
    greedy = AR | {"temperature": 0}
    message = await messages.messages.create(**message_body, extra_body=greedy)
    assert message.content[0].text == text
    async with messages.messages.stream(**message_body, extra_body=greedy) as stream:
        assert await stream.get_final_text() == text
    counted = await messages.messages.count_tokens(model=MODEL, messages=asked)
    assert counted.input_tokens == chat.usage.prompt_tokens
    async with httpx.AsyncClient(base_url=server.url) as client:
        tokens = (await client.post("/tokenize", json={"messages": asked})).json()
    assert tokens["count"] == chat.usage.prompt_tokens

    function = {"name": "weather", "parameters": UNIT}
    response = await chats.responses.create(
        **response_body | {"max_output_tokens": 60},
        tools=[{"type": "function", **function}],
        tool_choice="required",
        parallel_tool_calls=False,
        extra_body=AR,
    )
    message = await messages.messages.create(
        **message_body | {"max_tokens": 60},
        tools=[{"name": "weather", "input_schema": UNIT}],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        extra_body=greedy,
    )
    assert response.output[0].name == message.content[0].name == "weather"
    assert json.loads(response.output[0].arguments) == message.content[0].input
    with pytest.raises(anthropic.NotFoundError):
        await messages.messages.create(**message_body | {"model": "gpt"})
