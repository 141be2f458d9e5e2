"""LlamaIndex, by its package for servers like OpenAI's."""

import pytest
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

from tests.clients.asked import MODEL, SORT, SORTED, WEATHER, Report, get_weather


def model(base_url: str, **more: object) -> OpenAILike:
    return OpenAILike(
        model=MODEL,
        api_base=base_url,
        api_key="none",
        context_window=1024,
        temperature=0,
        is_chat_model=True,
        is_function_calling_model=True,
        max_retries=0,
        **more,
    )


async def test_chat(base_url: str) -> None:
    llm = model(base_url)
    asked = [ChatMessage(role="user", content=SORT)]
    assert llm.chat(asked).message.content == SORTED
    assert llm.complete(SORT).text == SORTED
    assert (await llm.achat(asked)).message.content == SORTED
    assert [chunk.message.content for chunk in llm.stream_chat(asked)][-1] == SORTED


@pytest.mark.parametrize("parallel", [True, False])
def test_a_forced_call(base_url: str, parallel: bool) -> None:
    llm, weather = model(base_url), FunctionTool.from_defaults(get_weather)
    answered = llm.chat_with_tools(
        [weather], user_msg=WEATHER, tool_required=True, allow_parallel_tool_calls=parallel
    )
    first = llm.get_tool_calls_from_response(answered)[0]
    assert first.tool_name == "get_weather"
    history = [
        ChatMessage(role="user", content=WEATHER),
        answered.message,
        *(
            ChatMessage(role="tool", content="rain", additional_kwargs={"tool_call_id": call.tool_id})
            for call in llm.get_tool_calls_from_response(answered)
        ),
    ]
    assert llm.chat(history, max_tokens=20).message.role == "assistant"


@pytest.mark.parametrize("by_schema", [True, False])
def test_structured_output(base_url: str, by_schema: bool) -> None:
    llm = model(base_url, should_use_structured_outputs=by_schema).as_structured_llm(Report)
    assert isinstance(llm.complete(WEATHER).raw, Report)
