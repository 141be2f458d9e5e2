"""aisuite: its OpenAI provider, with a tool that it runs itself."""

import json

import aisuite
import pytest

from tests.clients.asked import MODEL, SORT, SORTED, WEATHER, get_forecast

NAME = f"openai:{MODEL}"


@pytest.fixture
def client(base_url: str) -> aisuite.Client:
    return aisuite.Client({"openai": {"base_url": base_url, "api_key": "none"}})


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_text(client: aisuite.Client) -> None:
    whole = client.chat.completions.create(model=NAME, messages=asked(SORT), temperature=0)
    assert whole.choices[0].message.content == SORTED
    stream = client.chat.completions.create(model=NAME, messages=asked(SORT), temperature=0, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in stream if c.choices) == SORTED


def test_a_tool_that_it_runs(client: aisuite.Client) -> None:
    told = client.chat.completions.create(
        model=NAME,
        messages=asked(WEATHER),
        temperature=0,
        tools=[get_forecast],
        tool_choice="required",
        parallel_tool_calls=False,
        max_turns=1,
    )
    (call,) = [
        message.tool_calls[0]
        for message in told.choices[0].intermediate_messages
        if getattr(message, "tool_calls", None)
    ]
    assert isinstance(json.loads(call.function.arguments)["is_metric"], bool)
