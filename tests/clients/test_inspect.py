"""Inspect: its providers for OpenAI-like servers and for vLLM's, with tools, schemas and a task."""

import pytest
from inspect_ai import Task
from inspect_ai import eval as evaluate
from inspect_ai.dataset import Sample
from inspect_ai.model import (
    ChatMessageTool,
    ChatMessageUser,
    GenerateConfig,
    Model,
    ResponseSchema,
    get_model,
)
from inspect_ai.scorer import choice, includes
from inspect_ai.solver import generate, multiple_choice
from inspect_ai.tool import ToolInfo, ToolParams
from inspect_ai.util import json_schema

from tests.clients.asked import MODEL, SORT, SORTED, WEATHER, Report

TOOL = ToolInfo(
    name="get_forecast",
    description="Get the forecast.",
    parameters=ToolParams(properties={"is_metric": {"type": "boolean"}}, required=["is_metric"]),
)
GREEDY = GenerateConfig(temperature=0, max_tokens=200)


@pytest.fixture(params=["openai-api/triad", "vllm", "openai"])
def model(request: pytest.FixtureRequest, base_url: str, monkeypatch: pytest.MonkeyPatch) -> Model:
    monkeypatch.setenv("TRIAD_API_KEY", "none")
    return get_model(
        f"{request.param}/{MODEL}", base_url=base_url, api_key="none", config=GREEDY, memoize=False
    )


async def test_text(model: Model) -> None:
    told = await model.generate(SORT)
    assert (told.completion, told.stop_reason) == (SORTED, "stop")
    assert told.usage is not None


async def test_a_forced_call_and_its_result(model: Model) -> None:
    told = await model.generate(WEATHER, tools=[TOOL], tool_choice="any")
    calls = told.message.tool_calls
    assert calls
    assert all(isinstance(call.arguments["is_metric"], bool) for call in calls)
    results = [
        ChatMessageTool(content="rain", tool_call_id=call.id, function="get_forecast") for call in calls
    ]
    history = [ChatMessageUser(content=WEATHER), told.message, *results]
    config = GenerateConfig(max_tokens=20)
    answered = await model.generate(history, tools=[TOOL], tool_choice="none", config=config)
    assert not answered.message.tool_calls


async def test_a_schema_and_effort(model: Model) -> None:
    form = ResponseSchema(name="report", json_schema=json_schema(Report))
    config = GenerateConfig(response_schema=form, reasoning_effort="low")
    told = await model.generate([ChatMessageUser(content=WEATHER)], config=config)
    Report.model_validate_json(told.completion)


def test_a_task(base_url: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIAD_API_KEY", "none")
    model = get_model(f"openai-api/triad/{MODEL}", base_url=base_url, config=GREEDY, memoize=False)
    sorting = Task(
        [Sample(input=SORT, target="1. door")], solver=generate(), scorer=includes(), name="sorting"
    )
    choosing = Task(
        [Sample(input="2 + 2?", choices=["3", "4"], target="B")],
        solver=multiple_choice(),
        scorer=choice(),
        name="choosing",
    )
    logs = evaluate([sorting, choosing], model=model, log_dir=str(tmp_path), display="none")
    assert [log.status for log in logs] == ["success"] * 2
    assert logs[0].results.scores[0].metrics["accuracy"].value == 1
