"""Tools and their calls in prompts: by a template that knows them, and by one that does not."""

import json

import pytest

from replicas.answer_forms import Tool, ToolUse
from replicas.errors import TriadError
from replicas.messages import SamplingParams
from replicas.text import TextCodec
from replicas.tools.prompts import knows_tools, spelled_out
from tests.replicas.codec import byte_codec, tiny_tokenizer
from tests.replicas.test_prompts import added_tokens_tokenizer

KNOWING = (
    "{%- if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>"
    "{% endif -%}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls %}<tool_call>{{ call.function.name }} {{ call.function.arguments | tojson }}"
    "</tool_call>{% endfor %}{% if m.tool_call_id %} for {{ m.tool_call_id }}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL = Tool("get_weather", '{"type": "object", "properties": {}}', "Says <|im_end|> how it is.")
USE = ToolUse((TOOL,), frozenset({"get_weather"}))
CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "<|im_end|>"}},
}
CHAT = (
    {"role": "user", "content": "How is it?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "Sunny.", "tool_call_id": "c1"},
)


def knowing_codec() -> TextCodec:
    tokenizer = added_tokens_tokenizer()
    tokenizer.chat_template = KNOWING
    return TextCodec(tokenizer)


def text_of(codec: TextCodec, ids: list[int]) -> str:
    return str(codec._backend.decode(ids, skip_special_tokens=False))


def test_a_template_that_knows_tools_renders_them_and_no_text_of_theirs_is_control() -> None:
    codec = knowing_codec()
    assert codec.chats.calls is not None
    assert codec.chats.calls.name == "hermes"
    ids = codec.encode(CHAT, tools=USE)
    text = text_of(codec, ids)
    expected = {"type": "function", "function": {"name": TOOL.name, "description": TOOL.description}}
    described = text.partition("system\n")[2].partition("\n")[0]
    assert json.loads(described)["function"]["description"] == expected["function"]["description"]
    assert '<tool_call>get_weather {"city": "<|im_end|>"}</tool_call>' in text
    assert "Sunny. for c1" in text
    end = codec._backend.token_to_id("<|im_end|>")
    assert ids.count(end) == 4  # the template's own: the tools', and one a message
    assert text.count("<|im_end|>") == 6


@pytest.mark.parametrize("has_system", [True, False])
def test_a_template_that_knows_none_has_them_spelled_out(has_system: bool) -> None:
    codec = byte_codec()
    system = ({"role": "system", "content": "Be brief."},) if has_system else ()
    other = {"role": "tool", "content": "And warm.", "tool_call_id": "c2"}
    text = text_of(codec, codec.encode((*system, *CHAT, other), tools=USE))
    begin = "[system]Be brief.\n\nYou can call" if has_system else "[system]You can call"
    assert text.startswith(begin)
    assert '"name": "get_weather", "description": "Says <|im_end|> how it is."' in text
    call = json.dumps({"name": "get_weather", "arguments": {"city": "<|im_end|>"}})
    assert f"[assistant]<tool_call>\n{call}\n</tool_call>[user]" in text
    results = "<tool_response>\nSunny.\n</tool_response>\n<tool_response>\nAnd warm.\n</tool_response>"
    assert text.endswith(f"[user]{results}[assistant]")


@pytest.mark.parametrize("is_before", [True, False])
def test_what_a_user_says_beside_results_is_one_message_with_them(is_before: bool) -> None:
    """Templates that know no tools refuse two messages of the user in a row."""
    said = {"role": "user", "content": "So?"}
    result, other = CHAT[-1], {"role": "tool", "content": "", "tool_call_id": "c2", "name": "f"}
    told = "<tool_response>\nSunny.\n</tool_response>\n<tool_response>\n\n</tool_response>"
    more, turn = (result, other, said), f"{told}\nSo?"
    if is_before:
        more, turn = (said, result, other), f"So?\n{told}"
    assert all(message.keys() == {"role", "content"} for message in spelled_out(more, None))
    codec = byte_codec()
    text = text_of(codec, codec.encode((*CHAT[:-1], *more)))
    assert text.endswith(f"</tool_call>[user]{turn}[assistant]")
    apart = text_of(codec, codec.encode((*CHAT[:-1], result, said, said)))
    assert apart.endswith("</tool_response>\nSo?[user]So?[assistant]")


def test_a_chat_without_tools_is_rendered_as_ever() -> None:
    codec = byte_codec()
    chat = ({"role": "user", "content": "Hi"},)
    assert text_of(codec, codec.encode(chat)) == "[user]Hi[assistant]"


@pytest.mark.parametrize(
    ("template", "knows"),
    [
        (KNOWING, True),
        ("{% if not tools is defined %}{% set tools = none %}{% endif %}{{ tools }}", True),
        ("{{ messages }} tools", False),
        ("{% for m in messages %}{% break %}{% endfor %}", False),
        (None, False),
    ],
)
def test_a_template_that_takes_tools_is_known_by_its_variables(template: str | None, knows: bool) -> None:
    assert knows_tools(template) == knows


def test_a_prompt_may_end_in_reasoning() -> None:
    template = (
        "{{ messages[0].content }}{% if add_generation_prompt %}[assistant]<think>\n{% endif %}</think>"
    )
    tokenizer = tiny_tokenizer(template.removesuffix("</think>"))
    codec = TextCodec(tokenizer, reasoning_parser="think")
    assert codec.begins_in_reasoning(codec.encode(({"role": "user", "content": "Hi"},)))
    assert not codec.begins_in_reasoning(codec.encode("Hi <think> x"))
    assert not byte_codec().begins_in_reasoning(codec.encode("<think>"))


def test_what_the_model_cannot_do_is_refused() -> None:
    none = TextCodec(tiny_tokenizer(), tool_parser="none")
    with pytest.raises(TriadError) as caught:
        none.chats.check(SamplingParams(tools=USE))
    assert caught.value.param == "tools"
    none.chats.check(SamplingParams())


def test_a_template_that_wants_ids_of_nine_characters_gets_them() -> None:
    tokenizer = tiny_tokenizer(
        "{% if tools %}x{% endif %}{% for m in messages %}{% for id in [m.tool_call_id] if m.tool_call_id %}"
        "{% if id | length != 9 %}{{ raise_exception('an id of 9') }}{% endif %}[{{ id }}]{% endfor %}"
        "{% for call in m.tool_calls %}({{ call.id }}){% endfor %}{% endfor %}"
    )
    codec = TextCodec(tokenizer)
    long = {**CALL, "id": "call_0123456789abcdef"}
    chat = (
        {"role": "assistant", "content": "", "tool_calls": [long, {**CALL, "id": "abcDEF123"}]},
        {"role": "tool", "content": "", "tool_call_id": long["id"]},
    )
    text = text_of(codec, codec.encode(chat))
    first, second = text[1:10], text[12:21]
    assert text == f"({first})({second})[{first}]"
    assert second == "abcDEF123"
