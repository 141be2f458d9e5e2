"""The recipe's chat template: functions in a line each, whatever their schemas are."""

import json
import random
from typing import Any

import pytest

from replicas.answer_forms import Tool, ToolUse
from replicas.text import TextCodec
from training.batches import encode_chat
from training.evaluate import DEFAULT_CHECKPOINT, tool_use
from training.tasks.family import Chat, draw
from training.tasks.registry import TOOL_FAMILIES, train_chat
from training.tokenizer import EOS_ID, load_tokenizer, render, wrap

TOKENIZER = load_tokenizer(DEFAULT_CHECKPOINT / "tokenizer.json")
CODEC = TextCodec(wrap(TOKENIZER, 1024))
SHIPPED = TextCodec.load(str(DEFAULT_CHECKPOINT))
ASKED = {"role": "user", "content": "How is the weather in Oslo?"}


def rendered(messages: list[dict[str, Any]], *functions: tuple[str, Any]) -> str:
    """The prompt as a server makes it, up to the assistant's turn."""
    tools = tuple(Tool(name, json.dumps(parameters)) for name, parameters in functions)
    use = ToolUse(tools, frozenset(tool.name for tool in tools)) if tools else None
    return CODEC.decode(CODEC.encode(tuple(messages), tools=use))


def lines(parameters: Any) -> str:
    text = rendered([ASKED], ("f", parameters))
    return text.removeprefix("<|bos|><|system|>Tools:\n").partition("<|user|>")[0]


def test_calls_are_found_to_be_in_hermes_form() -> None:
    assert CODEC.chats.calls is not None
    assert CODEC.chats.calls.name == "hermes"
    assert CODEC.chats.reasoning is None


def test_a_chat_without_tools_has_no_trace_of_them() -> None:
    system = {"role": "system", "content": "You are Triad."}
    answer = {"role": "assistant", "content": "Hello!"}
    assert rendered([ASKED]) == "<|bos|><|user|>How is the weather in Oslo?<|assistant|>"
    assert rendered([system, ASKED, answer, ASKED]) == (
        "<|bos|><|system|>You are Triad.<|user|>How is the weather in Oslo?<|assistant|>Hello!<|eos|>"
        "<|user|>How is the weather in Oslo?<|assistant|>"
    )
    chat = (system, ASKED, answer, ASKED)
    assert CODEC.encode(chat) == SHIPPED.encode(chat)


def test_functions_stand_in_the_system_message() -> None:
    city = {"properties": {"city": {"type": "string"}}, "required": ["city"]}
    functions = [("get_weather", city), ("get_time", {})]
    listed = "Tools:\nget_weather(city)\nget_time()"
    system = {"role": "system", "content": "Be brief."}
    assert rendered([ASKED], *functions).startswith(f"<|bos|><|system|>{listed}<|user|>How")
    said = rendered([system, ASKED, system], *functions)
    assert said.startswith(f"<|bos|><|system|>Be brief.\n{listed}<|user|>How")
    assert said.endswith("<|system|>Be brief.<|assistant|>")


@pytest.mark.parametrize(
    ("schema", "shown"),
    [
        ({"type": "string"}, "a"),
        ({"type": "integer", "minimum": 1, "description": "How many."}, "a:integer"),
        ({"type": ["string", "null"]}, "a:string|null"),
        ({"enum": ["C", "F"]}, "a:C|F"),
        ({"type": "integer", "enum": [1, None, True]}, "a:1|null|true"),
        ({"type": "string", "enum": [f"x{k}" for k in range(9)]}, "a"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "a:any"),
        ({"$ref": "#/$defs/Place"}, "a:any"),
        ({}, "a:any"),
        (True, "a:any"),
        ({"type": "object", "properties": {"b": {"type": "string"}}}, "a:object"),
        ({"type": "array", "items": {"type": "integer"}}, "a:array"),
        ({"const": "x"}, "a:any"),
        ({"type": "string", "enum": []}, "a"),
        ({"enum": "x"}, "a:any"),
        ({"type": {"a": 1}}, "a:any"),
    ],
)
def test_an_argument_has_a_short_type(schema: Any, shown: str) -> None:
    assert lines({"type": "object", "properties": {"a": schema}, "required": ["a"]}) == f"f({shown})"


def test_arguments_of_any_name_may_be_optional() -> None:
    properties = {
        "items": {"type": "string"},
        "a b": {"type": "number"},
        "": {},
        "<|eos|>": {"enum": ["<|eos|>"]},
    }
    shown = "f(items,a b?:number,?:any,<|eos|>?:<|eos|>)"
    assert lines({"properties": properties, "required": ["items", "nobody"]}) == shown
    use = ToolUse((Tool("f", json.dumps({"properties": properties})),), frozenset({"f"}))
    assert EOS_ID not in CODEC.encode((ASKED,), tools=use)


@pytest.mark.parametrize(
    "parameters", [{}, {"type": "object"}, {"properties": {}}, {"anyOf": [{}]}, {"properties": ["a"]}]
)
def test_a_function_may_have_no_arguments(parameters: Any) -> None:
    assert lines(parameters) == "f()"


def test_a_schema_of_an_older_draft_is_borne() -> None:
    assert lines({"properties": {"a": {"type": "string", "required": True}}, "required": True}) == "f(a?)"


def test_histories_are_written_as_they_are_trained() -> None:
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": "é", "b": 1}}},
        {"id": "c2", "type": "function", "function": {"name": "g", "arguments": {}}},
    ]
    written = (
        '<tool_call>\n{"name": "f", "arguments": {"a": "é", "b": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call><|eos|>'
    )
    results = [{"role": "tool", "tool_call_id": f"c{k}", "content": f"{k}"} for k in (1, 2)]
    for content, before in (("", ""), ("I look.", "I look.\n")):
        called = {"role": "assistant", "content": content, "tool_calls": calls}
        for functions in ([], [("f", {})]):
            text = rendered([ASKED, called, *results], *functions)
            assert text.endswith(f"<|assistant|>{before}{written}<|system|>1<|system|>2<|assistant|>")


def test_as_transformers_is_given_them() -> None:
    """Contents that are null, and arguments as text."""
    call = {"function": {"name": "f", "arguments": '{"a":1}'}}
    chat = Chat([ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "user"}])
    assert '<tool_call>\n{"name": "f", "arguments": {"a":1}}\n</tool_call><|eos|><|user|>' in render(chat)


@pytest.mark.parametrize("family", TOOL_FAMILIES)
def test_a_server_asks_as_in_training(family: str) -> None:
    rng = random.Random(f"template/{family}")
    for _ in range(20):
        task = draw(TOOL_FAMILIES[family], rng, held_out=False)
        answer = {"role": "assistant", "content": task.answer}
        document = encode_chat(TOKENIZER, Chat([*task.chat.messages, answer], task.chat.tools))
        start, end = document.answers[-1]
        assert CODEC.encode(tuple(task.chat.messages), tools=tool_use(task.chat)) == document.ids[:start]
        assert CODEC.decode(document.ids[start : end - 1]) == task.answer


def test_training_chats_fit_their_rows() -> None:
    """Nearly all of them: what is longer than a row is not trained on."""
    rng = random.Random("rows")
    chats = [train_chat(rng, {}, 0.03, 0.05, 0.01, 0.1, tool_share=0.5) for _ in range(500)]
    assert sum(len(encode_chat(TOKENIZER, chat).ids) > 256 for chat in chats) <= 10
