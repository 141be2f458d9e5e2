"""Grammars of answers with calls: every walk they allow is calls that validate, or text, in every format."""

import json
from random import Random
from typing import Any

import jsonschema
import pytest
from pydantic import TypeAdapter

from replicas.answer_forms import JsonFormat, Tool
from replicas.errors import TriadError
from replicas.grammar import JsonGrammar, compile_schema
from replicas.json_schema import SchemaRefused
from replicas.messages import Delta
from replicas.tools.families import FORMATS
from replicas.tools.grammar import AnswerGrammar
from replicas.tools.output import OutputParser
from replicas.tools.reasoning import MARKS
from router.deltas import joined
from tests.replicas.test_grammar import CODEC, EOS, compiler, text_of, tokens_in
from tests.replicas.tools.schemas import pydantic_model, zod_schema

ENDS = (b'"', b"}", b"]", b")", b"<", b"[", b",")
MAX_WALK = 400
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "metric": {"type": "boolean"},
    },
    "required": ["city"],
    "additionalProperties": False,
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
SCHEMAS = {"get_weather": WEATHER, "get": NOTHING}
TOOLS = tuple(Tool(name, json.dumps(schema)) for name, schema in SCHEMAS.items())
TOKENIZER = compiler()._load_tokenizer()


def order(name: str = "hermes", **more: Any) -> AnswerGrammar:
    return AnswerGrammar(name, more.pop("tools", TOOLS), more.pop("places", (0, 1)), **more)


def walk(asked: AnswerGrammar, rng: Random, begin: str = "", ends: float = 0.5) -> tuple[str, bool]:
    """A random answer, and whether it came to an end; begin: what it is made to begin with."""
    grammar = JsonGrammar(compile_schema(TOKENIZER, asked).deep_copy())
    tokens = list(CODEC._backend.encode(begin, add_special_tokens=False).ids)
    for token in tokens:
        assert token in tokens_in(grammar.masks(())[0]), begin
        grammar.accept(token)
    while not grammar.is_complete and EOS not in tokens and len(tokens) < MAX_WALK:
        may = tokens_in(grammar.masks(())[0])
        good = [token for token in may if token == EOS or CODEC.token_bytes(token)[:1] in ENDS]
        tokens.append(rng.choice(good if good and rng.random() < ends else may))
        if tokens[-1] != EOS:
            grammar.accept(tokens[-1])
    return text_of(tokens), grammar.is_complete or tokens[-1] == EOS


def read(asked: AnswerGrammar, text: str, rng: Random) -> Delta:
    names = [tool.name for tool in asked.tools]
    format_ = FORMATS[asked.format] if asked.format else None
    parser = OutputParser(format_, names, asked.reasoning, asked.begins_in_reasoning, lambda tag: tag)
    cut = rng.randint(0, len(text))
    pieces = [parser.push(text[:cut]), parser.push(text[cut:]), parser.finish()]
    return joined([Delta("r", p.text, 0, reasoning=p.reasoning, tool_calls=p.calls) for p in pieces])


@pytest.mark.parametrize("is_parallel", [True, False])
@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_forced_answer_is_calls_alone_and_each_validates(name: str, is_parallel: bool) -> None:
    counts = set()
    for seed in range(12):
        rng = Random(seed)
        asked = order(name, is_required=True, is_parallel=is_parallel)
        text, is_whole = walk(asked, rng)
        found = read(asked, text, rng)
        assert found.text == ""
        if not is_whole:
            continue
        for call in found.tool_calls:
            jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name or ""])
        counts.add(len(found.tool_calls))
    assert 0 not in counts
    assert counts == {1} if not is_parallel else max(counts) > 1


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_free_answer_is_text_until_a_call_opens_and_forced_from_there(name: str) -> None:
    format_ = FORMATS[name]
    for seed in range(4):
        rng = Random(seed)
        asked = order(name, is_parallel=False)
        text, is_whole = walk(asked, rng, "Hello, {there}. [1] <b>")
        assert read(asked, text, rng).text.startswith("Hello, {there}. [1] <b>")
        begin = {"llama3_json": '{"name":', "pythonic": "[get_weather("}.get(name)
        text, is_whole = walk(asked, rng, begin or f"Well. {format_.opening}")
        found = read(asked, text, rng)
        assert found.text == ("" if begin else "Well.")
        assert is_whole
        (call,) = found.tool_calls
        jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name or ""])


def test_a_call_behind_a_control_token_begins_with_that_token_alone() -> None:
    """The embedded tokenizer's <|user|> in the part of [TOOL_CALLS]."""
    control = CODEC._special_ids["<|user|>"]
    asked = order("mistral", is_required=True, control_ids=(("[TOOL_CALLS]", control),))
    grammar = JsonGrammar(compile_schema(TOKENIZER, asked).deep_copy())
    assert tokens_in(grammar.masks(())[0]) == [control]
    free = JsonGrammar(compile_schema(TOKENIZER, order("mistral", control_ids=asked.control_ids)).deep_copy())
    assert {control, EOS} <= set(tokens_in(free.masks(())[0]))
    free.accept(control)
    assert {CODEC.token_bytes(token)[:1] for token in tokens_in(free.masks(())[0])} == {b"g"}


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("is_required", [True, False])
def test_reasoning_comes_before_what_is_forced(begins: bool, is_required: bool) -> None:
    rng = Random(1)
    asked = order(is_required=is_required, reasoning=MARKS["think"], begins_in_reasoning=begins)
    begin = ("" if begins else "<think>") + "a <tool_call> b</think>\n\n<tool_call>"
    text, is_whole = walk(asked, rng, begin)
    found = read(asked, text, rng)
    assert is_whole
    assert (found.reasoning, found.text) == ("a <tool_call> b", "")
    assert found.tool_calls


def test_an_answer_in_json_or_a_call() -> None:
    answer = JsonFormat('{"enum": ["yes", "no"]}')
    text, is_whole = walk(order(answer=answer), Random(3), '"')
    assert is_whole
    assert json.loads(text) in ("yes", "no")
    rng = Random(3)
    text, is_whole = walk(order(answer=answer), rng, "<tool_call>")
    assert read(order(answer=answer), text, rng).tool_calls
    alone = AnswerGrammar(answer=answer, reasoning=MARKS["think"])
    text, _ = walk(alone, rng, "<think>Hm</think>")
    assert json.loads(read(alone, text, rng).text) in ("yes", "no")


@pytest.mark.parametrize("maker", ["pydantic", "zod"])
def test_every_forced_call_validates_against_random_schemas(maker: str) -> None:
    """250 schemas each, as pydantic and zod write them; in a hundred steps most answers come to their end."""
    num_whole = 0
    for seed in range(250):
        rng = Random(f"{maker} {seed}")
        model = pydantic_model(rng) if maker == "pydantic" else None
        schema = model.model_json_schema() if model is not None else zod_schema(rng)
        asked = order(
            rng.choice(["hermes", "mistral", "mistral_list", "llama3_json"]),
            tools=(Tool("act", json.dumps(schema)),),
            places=(0,),
            is_required=True,
            is_parallel=False,
        )
        text, is_whole = walk(asked, rng, ends=0.8)
        if not is_whole:
            continue
        num_whole += 1
        (call,) = read(asked, text, rng).tool_calls
        arguments = json.loads(call.arguments)
        jsonschema.validate(arguments, schema, format_checker=jsonschema.FormatChecker())
        if model is not None:
            TypeAdapter(model).validate_json(call.arguments)
    assert num_whole >= 200


def compile_fault(tools: tuple[Tool, ...]) -> TriadError:
    with pytest.raises(TriadError) as caught:
        compiler().compile(order(tools=tools, places=tuple(range(len(tools))), is_required=True))
    return caught.value


@pytest.mark.parametrize(
    ("schema", "strict", "says"),
    [
        ({"type": "object", "properties": {"a": {"type": "bogus"}}}, False, "bogus"),
        ({"type": "object", "properties": {"a": {"$ref": "#/$defs/none"}}}, False, "none"),
        (
            {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}},
            True,
            "uniqueItems",
        ),
        ({"$ref": "#"}, False, "refers to itself"),
        ({"type": "object", "properties": [1]}, False, "properties"),
        ({"type": "object", "properties": {"a": {}}, "required": 7}, False, "required"),
    ],
)
def test_the_tool_whose_schema_cannot_be_enforced_is_named(schema: dict, strict: bool, says: str) -> None:
    fault = compile_fault((TOOLS[0], Tool("bad", json.dumps(schema), strict=strict)))
    assert fault.param == "tools[1].function.parameters"
    assert says in fault.message
    assert "arguments_" not in fault.message
    assert ('"strict": false' in fault.message) == strict


def test_without_strict_what_cannot_be_enforced_is_left_out_and_the_tool_is_named() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    asked = order(tools=(TOOLS[0], Tool("bad", json.dumps(schema))), places=(0, 1))
    warning = compiler().compile(asked).warning
    assert warning is not None
    assert "'bad'" in warning
    assert "uniqueItems" in warning
    assert compiler().compile(order(tools=TOOLS[:1], places=(0,))).warning is None


@pytest.mark.parametrize("name", ["from", "class", "in", "import", "with", "is", "µ"])
def test_arguments_of_any_name_are_read_as_they_are_forced(name: str) -> None:
    schema = {"properties": {name: {"enum": ["a"]}}, "required": [name], "additionalProperties": False}
    tools = (Tool("f", json.dumps(schema)),)
    asked = order("pythonic", tools=tools, places=(0,), is_required=True, is_parallel=False)
    text, is_whole = walk(asked, Random(1))
    assert is_whole
    (call,) = read(asked, text, Random(1)).tool_calls
    assert json.loads(call.arguments) == {name: "a"}


def test_python_names_arguments_or_the_schema_is_refused() -> None:
    for schema in ({"anyOf": [WEATHER]}, {"properties": {"two words": {}}}):
        with pytest.raises(SchemaRefused):
            compile_schema(TOKENIZER, order("pythonic", tools=(Tool("f", json.dumps(schema)),), places=(0,)))


def test_a_function_that_declares_no_arguments_has_none() -> None:
    for schema, may_have in (({"properties": {}}, False), ({"type": "object"}, True)):
        tools = (Tool("f", json.dumps(schema)),)
        grammar = JsonGrammar(compile_schema(TOKENIZER, order(tools=tools, places=(0,))).deep_copy())
        for token in CODEC._backend.encode(
            '<tool_call>\n{"name": "f", "arguments": {', add_special_tokens=False
        ).ids:
            grammar.accept(token)
        next_bytes = {CODEC.token_bytes(token)[:1] for token in tokens_in(grammar.masks(())[0])}
        assert (b'"' in next_bytes) == may_have


def test_arguments_that_are_not_declared_are_not_given_unless_the_schema_speaks_of_them() -> None:
    schema: dict[str, Any] = {"properties": {"a": {"enum": [1]}}, "required": ["a"]}
    begin = '<tool_call>\n{"name": "f", "arguments": {"a":1'
    for more, may_go_on in (
        ({}, False),
        ({"additionalProperties": True}, True),
        ({"minProperties": 1}, True),
    ):
        tools = (Tool("f", json.dumps(schema | more)),)
        grammar = JsonGrammar(compile_schema(TOKENIZER, order(tools=tools, places=(0,))).deep_copy())
        for token in CODEC._backend.encode(begin, add_special_tokens=False).ids:
            grammar.accept(token)
        next_bytes = {CODEC.token_bytes(token)[:1] for token in tokens_in(grammar.masks(())[0])}
        assert (b"," in next_bytes) == may_go_on
