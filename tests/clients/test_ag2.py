"""AG2: agents over chats and Responses, with tools and typed answers."""

import pytest
from ag2 import Agent
from ag2.config import ModelConfig
from ag2.config.openai import OpenAIConfig, OpenAIResponsesConfig

from tests.clients.asked import MODEL, SORT, SORTED, WEATHER, Report, get_forecast


@pytest.fixture(params=["chat", "responses"])
def config(request: pytest.FixtureRequest, base_url: str) -> ModelConfig:
    kind = OpenAIConfig if request.param == "chat" else OpenAIResponsesConfig
    return kind(model=MODEL, base_url=base_url, api_key="none", temperature=0)


@pytest.mark.parametrize("streaming", [False, True])
async def test_text(config: ModelConfig, streaming: bool) -> None:
    agent = Agent("sorter", config=config.copy(streaming=streaming))
    reply = await agent.ask(SORT)
    assert reply.body == SORTED
    again = await reply.ask(SORT)
    assert again.body


async def test_a_typed_answer(config: ModelConfig) -> None:
    reply = await Agent("forecaster", config=config, response_schema=Report).ask(WEATHER)
    assert isinstance(await reply.content(), Report)


async def test_a_tool_is_offered(config: ModelConfig) -> None:
    agent = Agent("forecaster", config=config, tools=[get_forecast])
    assert (await agent.ask(WEATHER)).body is not None
