"""OpenAI's Agents SDK, over Responses, its default, and over chats."""

import pytest
from agents import (
    Agent,
    Model,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI

from tests.clients.asked import MODEL, SORT, SORTED, WEATHER, Report, get_weather

set_tracing_disabled(True)
GREEDY = ModelSettings(temperature=0, max_tokens=200)


@pytest.fixture(params=[OpenAIResponsesModel, OpenAIChatCompletionsModel], ids=["responses", "chat"])
def model(request: pytest.FixtureRequest, base_url: str) -> Model:
    client = AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0)
    return request.param(model=MODEL, openai_client=client)


async def test_text_in_two_turns(model: Model) -> None:
    agent = Agent(name="sorter", instructions="Sort.", model=model, model_settings=GREEDY)
    first = await Runner.run(agent, SORT)
    assert isinstance(first.final_output, str)
    again = await Runner.run(agent, [*first.to_input_list(), {"role": "user", "content": SORT}])
    assert isinstance(again.final_output, str)


async def test_a_stream(model: Model) -> None:
    agent = Agent(name="sorter", model=model, model_settings=GREEDY)
    streamed = Runner.run_streamed(agent, SORT)
    deltas = [
        event.data.delta
        async for event in streamed.stream_events()
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
    ]
    assert "".join(deltas) == streamed.final_output == SORTED


async def test_an_output_type(model: Model) -> None:
    agent = Agent(name="reporter", model=model, output_type=Report)
    assert isinstance((await Runner.run(agent, WEATHER)).final_output, Report)


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_forced_call_and_its_result(model: Model, streamed: bool) -> None:
    """The SDK asks with tool_choice 'required', calls the function, and stops at its result."""
    agent = Agent(
        name="reporter",
        model=model,
        tools=[function_tool(get_weather)],
        model_settings=ModelSettings(
            tool_choice="required", parallel_tool_calls=False, store=True, verbosity="low"
        ),
        tool_use_behavior="stop_on_first_tool",
    )
    if streamed:
        ended = Runner.run_streamed(agent, WEATHER)
        assert [event async for event in ended.stream_events()]
    else:
        ended = await Runner.run(agent, WEATHER)
    assert "days of rain" in ended.final_output
    after = Agent(name="answerer", model=model, model_settings=ModelSettings(max_tokens=20))
    assert isinstance((await Runner.run(after, ended.to_input_list())).final_output, str)


async def test_a_handoff(model: Model) -> None:
    last = Agent(name="sorter", model=model, model_settings=GREEDY)
    first = Agent(
        name="desk", model=model, handoffs=[last], model_settings=ModelSettings(tool_choice="required")
    )
    assert (await Runner.run(first, SORT)).last_agent is last
