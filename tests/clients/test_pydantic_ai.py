"""Pydantic AI: agents with tools and typed outputs, over chats, Responses and Messages."""

from collections.abc import Sequence

import pytest
from pydantic_ai import Agent, NativeOutput, RunContext, ToolOutput
from pydantic_ai.capabilities import PrepareOutputTools
from pydantic_ai.models import Model
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.tools import Tool, ToolDefinition

from tests.clients.asked import MODEL, SORT, SORTED, WEATHER, Report, get_weather

GREEDY = {"temperature": 0.0, "max_tokens": 200}


def models(base_url: str) -> dict[str, Model]:
    openai = OpenAIProvider(base_url=base_url, api_key="none")
    anthropic = AnthropicProvider(base_url=base_url.removesuffix("/v1"), api_key="none")
    return {
        "chat": OpenAIChatModel(MODEL, provider=openai),
        "responses": OpenAIResponsesModel(MODEL, provider=openai),
        "messages": AnthropicModel(MODEL, provider=anthropic),
    }


@pytest.fixture(params=["chat", "responses", "messages"])
def model(request: pytest.FixtureRequest, base_url: str) -> Model:
    return models(base_url)[request.param]


async def test_text(model: Model) -> None:
    agent = Agent(model, model_settings=GREEDY)
    first = await agent.run(SORT)
    assert first.output == SORTED
    async with agent.run_stream(SORT) as streamed:
        assert [text async for text in streamed.stream_text(debounce_by=None)][-1] == SORTED
    again = await agent.run("Again.", message_history=first.all_messages())
    assert isinstance(again.output, str)


async def test_an_output_by_a_forced_call(model: Model) -> None:
    assert isinstance((await Agent(model, output_type=Report).run(WEATHER)).output, Report)


async def test_an_output_by_a_schema(model: Model) -> None:
    if isinstance(model, AnthropicModel):
        pytest.skip("the client itself refuses it but for Claude's own names")
    assert isinstance((await Agent(model, output_type=NativeOutput(Report)).run(WEATHER)).output, Report)


async def test_a_tool_and_then_an_output(model: Model) -> None:
    """First the tool alone is offered and then the output alone, so that both are called."""

    async def at_first(context: RunContext, tool: ToolDefinition) -> ToolDefinition | None:
        return tool if context.run_step == 1 else None

    async def later(context: RunContext, tools: Sequence[ToolDefinition]) -> list[ToolDefinition]:
        return [] if context.run_step == 1 else list(tools)

    agent = Agent(
        model,
        output_type=ToolOutput(Report),
        tools=[Tool(get_weather, prepare=at_first)],
        capabilities=[PrepareOutputTools(later)],
    )
    ended = await agent.run(WEATHER)
    assert isinstance(ended.output, Report)
    parts = [part for message in ended.all_messages() for part in message.parts]
    assert [
        part.content for part in parts if part.part_kind == "tool-return" and part.tool_name == "get_weather"
    ]
