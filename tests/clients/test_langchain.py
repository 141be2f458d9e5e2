"""LangChain, by its package for OpenAI."""

import jsonschema
import pytest
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI

from tests.clients.asked import MODEL, SCHEMA, SORT, SORTED, WEATHER, Report, get_weather

weather = tool(get_weather, args_schema=SCHEMA | {"title": "get_weather", "description": "Get the weather."})


@pytest.fixture(params=[False, True], ids=["chat", "responses"])
def model(request: pytest.FixtureRequest, base_url: str) -> ChatOpenAI:
    return ChatOpenAI(
        model=MODEL,
        base_url=base_url,
        api_key="none",
        temperature=0,
        use_responses_api=request.param,
        stream_usage=True,
    )


def test_invoke_and_stream(model: ChatOpenAI) -> None:
    assert model.invoke(SORT).text == SORTED
    chunks = list(model.stream(SORT))
    assert "".join(chunk.text for chunk in chunks) == SORTED
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.usage_metadata["output_tokens"] > 1


def test_forced_calls_and_a_result(model: ChatOpenAI) -> None:
    forced = model.bind_tools([weather], tool_choice="any", parallel_tool_calls=False)
    called = forced.invoke(WEATHER)
    (call,) = called.tool_calls
    jsonschema.validate(call["args"], SCHEMA)
    whole = None
    for chunk in forced.stream(WEATHER):
        whole = chunk if whole is None else whole + chunk
    assert [call["args"] for call in whole.tool_calls] == [call["args"]]
    history = [HumanMessage(WEATHER, name="ann"), called, ToolMessage("rain", tool_call_id=call["id"])]
    answered = model.bind_tools([weather], tool_choice="none").bind(max_tokens=20).invoke(history)
    assert not answered.tool_calls


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize("strict", [None, True, False])
def test_structured_output(model: ChatOpenAI, method: str, strict: bool | None) -> None:
    structured = model.with_structured_output(Report, method=method, strict=strict)
    assert isinstance(structured.invoke(WEATHER), Report)


def test_an_agent(model: ChatOpenAI) -> None:
    """The model may call the function or not; where it does, the loop must come to an end or its bound."""
    agent = create_agent(model.bind(max_tokens=40), tools=[])
    assert isinstance(agent.invoke({"messages": [HumanMessage(SORT)]})["messages"][-1], AIMessage)
    agent = create_agent(model, tools=[weather], response_format=Report)
    answered = agent.invoke({"messages": [HumanMessage(WEATHER)]}, {"recursion_limit": 60})
    assert isinstance(answered["structured_response"], Report)


def test_hints(base_url: str) -> None:
    hinted = ChatOpenAI(
        model=MODEL, base_url=base_url, api_key="none", temperature=0, reasoning_effort="low", verbosity="low"
    )
    assert hinted.invoke(SORT).text == SORTED


def test_text_completions(base_url: str) -> None:
    assert isinstance(
        OpenAI(model=MODEL, base_url=base_url, api_key="none", max_tokens=5).invoke("Once"), str
    )
