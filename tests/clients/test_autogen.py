"""AutoGen: agents and a group chat, whose messages have names, tools and typed answers."""

import json

import pytest
from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.conditions import MaxMessageTermination
from autogen_agentchat.messages import StructuredMessage
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_core.models import (
    AssistantMessage,
    FunctionExecutionResult,
    FunctionExecutionResultMessage,
    ModelFamily,
    ModelInfo,
    UserMessage,
)
from autogen_core.tools import FunctionTool
from autogen_ext.models.openai import OpenAIChatCompletionClient

from tests.clients.asked import MODEL, SORT, SORTED, WEATHER, Report, get_forecast

INFO = ModelInfo(
    vision=False, function_calling=True, json_output=True, family=ModelFamily.UNKNOWN, structured_output=True
)


def client(base_url: str, **more: object) -> OpenAIChatCompletionClient:
    return OpenAIChatCompletionClient(
        model=MODEL, base_url=base_url, api_key="none", model_info=INFO, temperature=0, **more
    )


async def test_text(base_url: str) -> None:
    asked = [UserMessage(content=SORT, source="user")]
    whole = await client(base_url).create(asked)
    assert (whole.content, whole.finish_reason) == (SORTED, "stop")
    assert whole.usage.completion_tokens > 1
    *pieces, last = [piece async for piece in client(base_url).create_stream(asked)]
    assert "".join(pieces) == last.content == SORTED


async def test_a_forced_call(base_url: str) -> None:
    tool = FunctionTool(get_forecast, description="Get the forecast.")
    asked = [UserMessage(content=WEATHER, source="user")]
    found = await client(base_url).create(asked, tools=[tool], tool_choice="required")
    for call in found.content:
        assert call.name == "get_forecast"
        assert isinstance(json.loads(call.arguments)["is_metric"], bool)
    results = [
        FunctionExecutionResult(content="rain", name=call.name, call_id=call.id, is_error=False)
        for call in found.content
    ]
    said = AssistantMessage(content=found.content, source="forecaster")
    history = [*asked, said, FunctionExecutionResultMessage(content=results)]
    answered = await client(base_url, max_tokens=20).create(history, tools=[tool], tool_choice="none")
    assert isinstance(answered.content, str)


async def test_an_agent_with_a_tool(base_url: str) -> None:
    """It offers its tools, and can't be told to call one."""
    agent = AssistantAgent("forecaster", client(base_url, max_tokens=60), tools=[get_forecast])
    assert (await agent.run(task=WEATHER)).messages[-1].source == "forecaster"


async def test_a_typed_answer(base_url: str) -> None:
    agent = AssistantAgent("forecaster", client(base_url), output_content_type=Report)
    last = (await agent.run(task=WEATHER)).messages[-1]
    assert isinstance(last, StructuredMessage)
    assert isinstance(last.content, Report)


@pytest.mark.parametrize("streams", [False, True])
async def test_a_group_of_agents(base_url: str, streams: bool) -> None:
    agents = [
        AssistantAgent(
            name, client(base_url, max_tokens=20), system_message=None, model_client_stream=streams
        )
        for name in ("sorter", "reader")
    ]
    team = RoundRobinGroupChat(agents, termination_condition=MaxMessageTermination(4))
    told = (await team.run(task=SORT)).messages
    assert [message.source for message in told] == ["user", "sorter", "reader", "sorter"]
