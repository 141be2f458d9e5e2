"""Calls written in Python, `[f(a=1), g(b="x")]`: the format of Llama 4 and of some fine-tunes of Llama 3."""

import ast
import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from replicas.json_schema import OPTIONS, SchemaRefused
from replicas.tools.formats import CallSchema, Tag, ToolFormat, any_call, begins_with, literal, several
from replicas.tools.readers import CallReader, CallSink

_NAMES = {"true": True, "false": False, "null": None}
"""JSON's own words, which a grammar of JSON values writes."""
_BEGIN = re.compile(r"[\s,\[]*(?P<name>[a-zA-Z0-9_.-]+)\(")
_PART = re.compile(r"""[\[\](){}]|"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|["']""", re.DOTALL)


class Pythonic(ToolFormat):
    """A list of calls with named arguments, whose values are JSON's but for True, False and None."""

    name = "pythonic"

    def rules(self, calls: Sequence[CallSchema], is_parallel: bool, tag: Tag) -> list[str]:
        more = several(is_parallel, '", " call')
        found = [f'calls: first{more} "]"', f"call: {any_call(len(calls))}"]
        found.append("first: " + " | ".join(f"HEAD_{k} some_{k}" for k in range(len(calls))))
        for k, call in enumerate(calls):
            found += [
                rf"HEAD_{k}: /[ \n]{{0,2}}\[{call.name}\(/",
                f"call_{k}: {literal(f'{call.name}(')} some_{k}",
                *_arguments(k, json.loads(call.arguments)),
            ]
        return found

    def reader(self, tag: Tag) -> CallReader:
        return PythonicReader()

    def not_text(self, names: Collection[str]) -> str:
        return rf"\s*\[\s*({'|'.join(sorted(names))})\s*\("

    def begins_call(self, text: str, names: Collection[str], tag: Tag) -> bool | None:
        return begins_with(re.sub(r"\s*([\[(])\s*", r"\1", text.strip()), [f"[{name}(" for name in names])


def _arguments(number: int, schema: Mapping[str, Any]) -> list[str]:
    """Rules for a call's named arguments and the bracket behind them, in the schema's order.

    `some` rules come before the first argument, `more` rules behind one. SchemaRefused for a schema that
    isn't one of named arguments.
    """
    properties, required = schema.get("properties", {}), schema.get("required", [])
    beside = {"allOf", "anyOf", "oneOf", "$ref", "if"} & schema.keys()
    if beside or not isinstance(properties, dict) or not set(required) <= set(properties):
        raise SchemaRefused(
            "this model calls functions with named arguments, which are to be `properties` of an object; "
            f"write them out{f' in place of {min(beside)}' if beside else ''}"
        )
    shared = {key: schema[key] for key in ("$defs", "definitions", OPTIONS) if key in schema}
    found = []
    names = list(properties)
    for place, name in enumerate(names):
        if not name.isidentifier():
            raise SchemaRefused(f"this model can't name an argument {name!r}; use letters, digits and _")
        this, following = f"{number}_{place}", _at(number, place + 1)
        skip = "" if name in required else f" | some_{following}"
        found.append(f"some_{_at(number, place)}: argument_{this} more_{following}{skip}")
        skip = "" if name in required else f" | more_{following}"
        found.append(f'more_{_at(number, place)}: ", " argument_{this} more_{following}{skip}')
        found.append(f"argument_{this}: {literal(f'{name}=')} {_value(properties[name], shared)}")
    last = _at(number, len(names))
    return [*found, f'some_{last}: ")"', f'more_{last}: ")"']


def _at(number: int, place: int) -> str:
    return f"{number}_{place}" if place else str(number)


def _value(schema: Any, shared: Mapping[str, Any]) -> str:
    kind = schema.get("type") if isinstance(schema, dict) else None
    if kind == "boolean" and not {"const", "enum"} & schema.keys():
        return '("True" | "False")'
    if kind == "null":
        return '"None"'
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    return f"%json {json.dumps({**shared, **schema})}"


class PythonicReader(CallReader):
    """Reads a list of calls; each comes as a whole, since its arguments have to be put in JSON."""

    def __init__(self) -> None:
        self._text = ""

    def push(self, text: str, sink: CallSink) -> None:
        self._text += text
        while self.rest is None and self._goes_on(sink):
            pass

    def _goes_on(self, sink: CallSink) -> bool:
        ahead = self._text.lstrip()
        if self.is_whole and ahead.startswith("]"):
            self.rest = ahead[1:]
            return False
        begin = _BEGIN.match(self._text)
        if begin is None:
            return False
        self.is_whole = False
        end = _end_of_brackets(self._text, begin.end() - 1)
        if end is None:
            return False
        arguments = _as_json(self._text[begin.end() - 1 : end])
        sink.begin(begin["name"], arguments)
        self._text = self._text[end:]
        self.is_whole = True
        return True


def _end_of_brackets(text: str, start: int) -> int | None:
    """The index behind the bracket that closes the one at start; None where it is not there yet."""
    depth = 0
    for part in _PART.finditer(text, start):
        if part[0] in ('"', "'"):
            return None  # a string that has not ended
        if part[0] in "([{":
            depth += 1
        elif part[0] in ")]}":
            depth -= 1
            if not depth:
                return part.end()
    return None


def _as_json(arguments: str) -> str:
    """The JSON object of a call's arguments in brackets; of what is no Python an object without any."""
    try:
        call = ast.parse(f"f{arguments}", mode="eval").body
        assert isinstance(call, ast.Call)
        return json.dumps({word.arg: _python(word.value) for word in call.keywords}, ensure_ascii=False)
    except (SyntaxError, ValueError, RecursionError, AssertionError):
        return "{}"


def _python(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=str() | int() | float() | None as value):
            return value
        case ast.Name(id=name) if name in _NAMES:
            return _NAMES[name]
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_python(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            names = [_python(key) if key is not None else None for key in keys]
            return {str(name): _python(value) for name, value in zip(names, values, strict=True)}
    raise ValueError("no literal")
