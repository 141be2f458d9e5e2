"""Semantic Kernel: chats, an agent, whose messages have its name, functions and typed answers."""

import openai
from semantic_kernel.agents import ChatCompletionAgent
from semantic_kernel.connectors.ai.function_choice_behavior import FunctionChoiceBehavior
from semantic_kernel.connectors.ai.open_ai import OpenAIChatCompletion, OpenAIChatPromptExecutionSettings
from semantic_kernel.contents import ChatHistory, FunctionCallContent
from semantic_kernel.functions import KernelArguments, kernel_function
from semantic_kernel.kernel import Kernel

from tests.clients.asked import MODEL, SORT, SORTED, WEATHER, Report, get_forecast


class Weather:
    @kernel_function(description="Get the forecast.")
    def get_forecast(self, is_metric: bool) -> str:
        return get_forecast(is_metric)


def service(base_url: str) -> OpenAIChatCompletion:
    client = openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0)
    return OpenAIChatCompletion(ai_model_id=MODEL, async_client=client)


def history(text: str) -> ChatHistory:
    chat = ChatHistory()
    chat.add_user_message(text)
    return chat


async def test_text(base_url: str) -> None:
    settings = OpenAIChatPromptExecutionSettings(temperature=0)
    whole = await service(base_url).get_chat_message_content(history(SORT), settings)
    assert str(whole) == SORTED
    streamed = service(base_url).get_streaming_chat_message_content(history(SORT), settings)
    assert "".join([str(piece) async for piece in streamed]) == SORTED


async def test_an_agent_by_its_defaults(base_url: str) -> None:
    agent = ChatCompletionAgent(
        service=service(base_url),
        name="sorter",
        instructions="Sort.",
        arguments=KernelArguments(settings=OpenAIChatPromptExecutionSettings(temperature=0, max_tokens=60)),
    )
    first = await agent.get_response(SORT)
    again = await agent.get_response("Again.", thread=first.thread)
    assert str(first.message)
    assert again.message.name == "sorter"


async def test_an_agent_with_a_function(base_url: str) -> None:
    agent = ChatCompletionAgent(
        service=service(base_url),
        plugins=[Weather()],
        arguments=KernelArguments(settings=OpenAIChatPromptExecutionSettings(temperature=0, max_tokens=60)),
    )
    assert (await agent.get_response(WEATHER)).message is not None


async def test_a_forced_call(base_url: str) -> None:
    kernel = Kernel()
    kernel.add_plugin(Weather(), "weather")
    settings = OpenAIChatPromptExecutionSettings(
        temperature=0, function_choice_behavior=FunctionChoiceBehavior.Required(auto_invoke=False)
    )
    told = await service(base_url).get_chat_message_content(history(WEATHER), settings, kernel=kernel)
    calls = [item for item in told.items if isinstance(item, FunctionCallContent)]
    assert calls
    assert {call.name for call in calls} == {"weather-get_forecast"}
    assert isinstance(calls[0].parse_arguments()["is_metric"], bool)


async def test_a_typed_answer(base_url: str) -> None:
    settings = OpenAIChatPromptExecutionSettings(temperature=0, response_format=Report)
    told = await service(base_url).get_chat_message_content(history(WEATHER), settings)
    Report.model_validate_json(str(told))
