"""smolagents: its OpenAI model, and an agent that calls tools until it has a final answer."""

from typing import Any

from smolagents import OpenAIModel, Tool, ToolCallingAgent
from smolagents.models import ChatMessage, MessageRole

from tests.clients.asked import MODEL, SORT, SORTED, WEATHER


class Forecast(Tool):
    name = "get_forecast"
    description = "Get the forecast."
    inputs = {"is_metric": {"type": "boolean", "description": "in C rather than F"}}  # noqa: RUF012
    output_type = "string"

    def forward(self, is_metric: bool) -> str:
        return f"rain at 7 {'C' if is_metric else 'F'}"


def model(base_url: str, **more: Any) -> OpenAIModel:
    return OpenAIModel(MODEL, api_base=base_url, api_key="none", temperature=0, **more)


def asked(text: str) -> list[ChatMessage]:
    return [ChatMessage(role=MessageRole.USER, content=[{"type": "text", "text": text}])]


def test_text(base_url: str) -> None:
    assert model(base_url)(asked(SORT)).content == SORTED
    pieces = [delta.content or "" for delta in model(base_url).generate_stream(asked(SORT))]
    assert "".join(pieces) == SORTED
    stopped = model(base_url)(asked(SORT), stop_sequences=["\n"])
    assert stopped.content == SORTED.partition("\n")[0]


def test_a_call_by_its_default_which_is_required(base_url: str) -> None:
    told = model(base_url)(asked(WEATHER), tools_to_call_from=[Forecast()])
    for call in told.tool_calls:
        assert call.function.name == "get_forecast"
        assert "is_metric" in call.function.arguments


def test_an_agent_calls_until_its_steps_are_over(base_url: str) -> None:
    """Its prompt leaves the embedded model little room, so the steps are few."""
    agent = ToolCallingAgent([Forecast()], model(base_url, max_tokens=120), max_steps=1)
    agent.prompt_templates["system_prompt"] = "Call tools."
    agent.run(WEATHER)
    (step,) = [each for each in agent.memory.steps if getattr(each, "step_number", None) == 1]
    assert step.error is None or "steps" in str(step.error)
    assert step.tool_calls
