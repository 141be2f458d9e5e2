"""Calls written in Python, `[f(a=1), g(b="x")]`: the format of Llama 4 and of some fine-tunes of Llama 3."""

import ast
import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from replicas.json_schema import OPTIONS, SchemaRefused
from replicas.tools.formats import CallSchema, Tag, ToolFormat, any_call, begins_with, literal, several
from replicas.tools.readers import OF_PYTHON, CallReader, CallSink, ObjectScanner

_WORDS = {"True": "true", "False": "false", "None": "null"}
"""Python's words with JSON's, which a grammar of JSON values writes."""
_BEGIN = re.compile(r"[\s,\[]*(?P<name>[a-zA-Z0-9_.-]+)\(")
_STRING = r"""(?:"(?:[^"\\]++|\\.)*+"|'(?:[^'\\]++|\\.)*+')"""
_JSON_STRING = re.compile(r'"(?:[^"\\\x00-\x1f]++|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*+"')
_VALUE = (
    rf"\s*(?:(?P<string>{_STRING})"
    r"|(?P<number>-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)(?![\w.])"
    r"|(?P<word>True|False|None|true|false|null)(?!\w)"
    r"|(?P<empty>\[\s*\]|\{\s*\})"
    r"|(?P<open>[\[{]))"
)
_ITEMS = {
    ")": re.compile(rf"\s*(?P<name>[^\s=]++)\s*={_VALUE}", re.DOTALL),
    "}": re.compile(rf"\s*(?P<key>{_STRING})\s*:{_VALUE}", re.DOTALL),
    "]": re.compile(_VALUE, re.DOTALL),
}
"""What may stand between the bracket that ends so and the one before it."""
_CLOSE = re.compile(r"\s*+(?:,\s*+)?+([)\]}])")
_COMMA = re.compile(r"\s*,")


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
        self._name = ""
        self._arguments: list[str] = []
        self._scanner: ObjectScanner | None = None

    def push(self, text: str, sink: CallSink) -> None:
        self._text += text
        while self.rest is None and self._goes_on(sink):
            pass

    def _goes_on(self, sink: CallSink) -> bool:
        """Takes the next part of a call off the text; False where it is not all there."""
        if self._scanner is not None:
            return self._read_arguments(self._scanner, sink)
        ahead = self._text.lstrip()
        if self.is_whole and ahead.startswith("]"):
            self.rest = ahead[1:]
            return False
        begin = _BEGIN.match(self._text)
        if begin is None:
            return False
        self._name, self._text = begin["name"], self._text[begin.end() - 1 :]
        self._scanner, self.is_whole = ObjectScanner(OF_PYTHON), False
        return True

    def _read_arguments(self, scanner: ObjectScanner, sink: CallSink) -> bool:
        end = scanner.scan(self._text)
        self._arguments.append(self._text[:end])
        self._text = "" if end is None else self._text[end:]
        if end is None:
            return False
        sink.begin(self._name, _as_json("".join(self._arguments)))
        self._arguments, self._scanner, self.is_whole = [], None, True
        return True


def _as_json(arguments: str) -> str:
    """The JSON object of a call's arguments in brackets; of what are no literals an object without any."""
    try:
        return _object_of(arguments)
    except (SyntaxError, ValueError):
        return "{}"


def _object_of(arguments: str) -> str:
    """As _as_json; SyntaxError or ValueError for what are no literals.

    It is not read by Python's own parser, which takes no keyword for a name, writes some names in other
    letters, and has bounds on numbers and depths. Numbers stay as they are written.
    """
    if re.fullmatch(r"\(\s*\)", arguments):
        return "{}"
    parts, closers = ["{"], [")"]
    at = 1
    while True:
        item = _ITEMS[closers[-1]].match(arguments, at)
        if item is None:
            raise ValueError("no literal")
        at = item.end()
        found = item.groupdict()
        if name := found.get("name"):
            if not name.isidentifier():
                raise ValueError("no name")
            parts.append(f'"{name}": ')
        elif key := found.get("key"):
            parts.append(f"{_string(key)}: ")
        if found["open"]:
            parts.append(found["open"])
            closers.append("]" if found["open"] == "[" else "}")
            continue
        parts.append(_literal(found))
        while end := _CLOSE.match(arguments, at):
            if end[1] != closers.pop():
                raise ValueError("another bracket is open")
            parts.append(end[1] if closers else "}")
            if not closers:
                return "".join(parts)
            at = end.end()
        comma = _COMMA.match(arguments, at)
        if comma is None:
            raise ValueError("no comma")
        at = comma.end()
        parts.append(", ")


def _literal(found: Mapping[str, str | None]) -> str:
    if found["string"] is not None:
        return _string(found["string"])
    if found["empty"] is not None:
        return found["empty"][0] + found["empty"][-1]
    word = found["word"] or ""
    return found["number"] or _WORDS.get(word, word)


def _string(text: str) -> str:
    """A string as JSON writes it, in which a grammar's own stay as they are."""
    return text if _JSON_STRING.fullmatch(text) else json.dumps(ast.literal_eval(text))
