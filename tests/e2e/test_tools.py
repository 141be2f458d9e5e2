"""A checkpoint that calls functions by itself, over HTTP: a call, its result, and an answer made of that."""

import json
from typing import Any

import openai
import pytest

from tests.e2e.host import Host

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

MODEL = "triad-5m-tools"


def function(name: str, **properties: dict[str, Any]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TEXT = {"type": "string"}
TOOLS = [function("get_weather", city=TEXT), function("send_email", to=TEXT, subject=TEXT)]


@pytest.fixture
def server(host: Host) -> Host:
    return host.serve(f"model={MODEL}", "calibration_s=0.2")


@pytest.mark.parametrize("mode", ["ar", "self_speculation", "auto"])
async def test_a_call_its_result_and_the_answer(server: Host, mode: str) -> None:
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    chat: list[Any] = [{"role": "user", "content": "How is the weather in Oslo?"}]
    body: dict[str, Any] = {
        "model": MODEL,
        "temperature": 0,
        "extra_body": {"decoding": {"mode": mode}},
    }
    asked = await client.chat.completions.create(messages=chat, tools=TOOLS, **body)
    assert asked.choices[0].finish_reason == "tool_calls"
    [call] = asked.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Oslo"}
    chat += [
        asked.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": '{"temperature": 21, "sky": "clear"}'},
    ]
    answered = await client.chat.completions.create(messages=chat, tools=TOOLS, **body)
    assert answered.choices[0].finish_reason == "stop"
    assert answered.choices[0].message.content == "The temperature is 21 and the sky is clear."
    nothing = [{"role": "user", "content": "How is the weather in Oslo?"}]
    refused = await client.chat.completions.create(messages=nothing, tools=TOOLS[1:], **body)
    assert refused.choices[0].message.content == "I have no tool for that."
    assert refused.choices[0].message.tool_calls is None
