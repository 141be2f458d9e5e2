"""Puts right, or refuses, what llguidance would get wrong of a JSON schema, before it sees it.

llguidance (1.9.1) keeps every number as a double, forms the least common multiple of two `multipleOf` in 32
bits, and takes options of its own from a schema. It forgets that a whole number is excluded where both bounds
have the same whole part. Its grammars are context-free, so they can't tell that a key has come before; and
the keys beside the declared ones may be spelled with escapes. Of patterns replicas.schema_patterns tells.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from typing import Any
from urllib.parse import unquote

from replicas.closed_objects import close_objects
from replicas.property_names import spell_names
from replicas.schema_patterns import narrowed, problem_of

MAX_EXACT = 2**53
"""The largest number up to which every integer is a double."""
MAX_BOUND = 2**63 - 1024
"""The largest double within 64 bits."""
_BOUNDS = {"minimum": 1, "exclusiveMinimum": 1, "maximum": -1, "exclusiveMaximum": -1}
_COMBINERS = ("allOf", "anyOf", "oneOf")
_OF_NAMES = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
"""Keywords whose value has names for keys, and schemas for values."""
_DATA = frozenset({"const", "enum", "default", "examples", "title", "description", "$comment"})
"""Keywords whose value has no schemas in it."""
_FORMATS = frozenset(
    {
        *("date-time", "date", "time", "duration", "email", "idn-email", "hostname", "idn-hostname", "ipv4"),
        *("ipv6", "uri", "uri-reference", "iri", "iri-reference", "uuid", "uri-template", "json-pointer"),
        *("relative-json-pointer", "regex"),
    }
)
"""Formats that JSON Schema has; any other is a note of the schema's author."""
OPTIONS = "x-guidance"
"""The key under which llguidance takes options from a schema."""
_ESCAPES = 'nrbtf\\"'
"""Characters after a backslash; \\u is left out unless a string of the schema needs it, since a key could
come again, spelled with it."""
WHITESPACE = r" |\n {0,4}"
"""The white space between two tokens of JSON, where there is any: a blank, or a line end with its indent.
Where it is free a small model may go on with it for ever."""
_CONTROL = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")
"""Characters that JSON has no shorter escape for than \\u and their code."""
_CONTROL_IN_PATTERN = re.compile(
    _CONTROL.pattern + r"|\\[acev0]|\\[xu]\{?0*(0[0-7b]|0?[ef]|1[0-9a-f]|7f|[0-7b])(?![0-9a-f])",
    re.IGNORECASE,
)


class SchemaRefused(Exception):
    """A schema can't be enforced. The text says what of it, to follow "the schema can't be enforced: ".

    param: the field of the request that has it, where there are several
    """

    def __init__(self, problem: str, param: str | None = None):
        super().__init__(problem)
        self.param = param


@dataclass(frozen=True, slots=True)
class Enforceable:
    """A schema that llguidance enforces."""

    schema: str
    """JSON text."""
    has_controls: bool
    """True if its strings may have characters that are written with \\u."""

    def options(self, whitespace: str, best_effort: bool) -> Any:
        """The options under which llguidance is to compile it.

        whitespace: a pattern of what may stand between the tokens of JSON
        """
        return {
            "item_separator": ",",
            "key_separator": ":",
            "whitespace_pattern": whitespace,
            "whitespace_flexible": True,
            "lenient": best_effort,
            "coerce_one_of": best_effort,
            "json_allowed_escapes": _ESCAPES + "u" * self.has_controls,
        }

    def embedded(self, whitespace: str, best_effort: bool) -> str:
        """The schema with its options in it, for a grammar that has it as a part."""
        schema = json.loads(self.schema)
        if isinstance(schema, bool):
            schema = {} if schema else {"not": {}}
        return json.dumps({**schema, OPTIONS: self.options(whitespace, best_effort)})


def enforceable(text: str, best_effort: bool) -> Enforceable:
    """The schema, such that each answer which llguidance then allows is one that `text` allows, without
    properties that it does not speak of.

    Bounds beyond 2**53 move inward to the next double, by some thousands at most, and some that are excluded
    by less than one part in 2**52. What can't be enforced is left out with best_effort, and is otherwise
    SchemaRefused.
    """
    try:
        schema = json.loads(text)
        if isinstance(schema, dict):
            schema.pop(OPTIONS, None)  # no keyword of JSON Schema, so it has no meaning
        for _, found in reversed(tuple(_schemas(schema, ""))):
            spell_names(found, partial(_referred, schema))
        close_objects(schema)
        _check_references(schema)
        for place, found in _schemas(schema, ""):
            for keyword in tuple(found):
                problem = _problem(found, keyword)
                if problem is None:
                    continue
                if not best_effort:
                    raise SchemaRefused(f"{place}{keyword}: {problem}")
                if keyword != "minProperties":  # which is kept as far as it goes
                    del found[keyword]
        _check_multiples(schema, best_effort)
        _exclude_whole_numbers(schema)
        has_controls = any(map(_has_controls, (found for _, found in _schemas(schema, ""))))
        if has_controls and not best_effort:
            _check_keys(schema)
        _narrow_patterns(schema)
        return Enforceable(json.dumps(schema, allow_nan=False), has_controls)
    except RecursionError:
        raise SchemaRefused("it is nested too deeply") from None
    except ValueError as error:  # such as an integer of more digits than Python takes
        raise SchemaRefused(str(error)) from None


def _schemas(value: Any, place: str, has_names: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object that may be a schema, wherever a reference may find it, and where it is ("a.b.")."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _schemas(item, f"{place}{index}.")
    elif isinstance(value, dict):
        if not has_names:
            yield place, value
        for key, item in tuple(value.items()):
            if has_names or key not in _DATA:
                yield from _schemas(item, f"{place}{key}.", not has_names and key in _OF_NAMES)


def _problem(schema: dict[str, Any], keyword: str) -> str | None:
    """Why a keyword can't be enforced, None where it can. Rounds bounds, and drops notes."""
    value = schema[keyword]
    if keyword in ("const", "enum"):
        for number in filter(_is_number, _leaves(value)):
            if not _comes_out_exact(number):
                return f"{number} would come out rounded; numbers are kept as doubles"
    elif keyword in _BOUNDS and _is_number(value):
        if not -(2**63) <= value < 2**63:
            if value * _BOUNDS[keyword] > 0:
                return f"{value} is beyond 64 bits"
            schema[keyword] = MAX_BOUND if value > 0 else -MAX_BOUND
        elif abs(value) >= MAX_EXACT:
            schema[keyword] = _rounded(int(value), _BOUNDS[keyword], keyword.startswith("exclusive"))
    elif keyword == "pattern" and isinstance(value, str):
        return problem_of(narrowed(value))
    elif keyword == "patternProperties" and isinstance(value, dict):
        return next(filter(None, map(problem_of, map(narrowed, value))), None)
    elif keyword == "format" and isinstance(value, str) and value not in _FORMATS and _has_pattern(schema):
        del schema[keyword]
    elif keyword == "minProperties" and isinstance(value, int):
        required = schema.get("required")
        num_required = len(set(map(str, required))) if isinstance(required, list) else 0
        if value > num_required + 1:
            return (
                f"of {value} properties only {num_required} are required, and the others might be "
                "one that comes several times; require more, or lower it"
            )
    return None


def _has_pattern(schema: dict[str, Any]) -> bool:
    """True if a pattern says of a string what a format of its author's own names."""
    parts = schema.get("allOf")
    together = [schema, *parts] if isinstance(parts, list) else [schema]
    return any("pattern" in part for part in together if isinstance(part, dict))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    else:
        yield value


def _comes_out_exact(number: int | float) -> bool:
    """True if the number comes out as it is: llguidance writes integers of 64 bits as such, other doubles as
    their shortest digits."""
    try:
        double = float(number)
    except OverflowError:
        return False
    if isinstance(number, int) and abs(number) <= MAX_BOUND:
        return int(double) == number
    return math.isfinite(double) and bool(json.loads(format(Decimal(repr(double)), "f")) == number)


def _rounded(bound: int, direction: int, is_excluded: bool) -> int:
    """The nearest double that lies in the direction from the bound, or on it, as do its shortest digits.

    llguidance goes by the double where it generates integers, and from one that is excluded to the double of
    the next integer; by the digits where it generates numbers.
    """

    def is_inside(double: float) -> bool:
        if is_excluded and (int(double + direction) - bound) * direction <= 0:
            return False
        return all((value - bound) * direction >= 0 for value in (int(double), int(Decimal(repr(double)))))

    double = float(max(-MAX_BOUND, min(MAX_BOUND, bound)))
    while not is_inside(double):
        double = math.nextafter(double, math.inf * direction)
    return int(double)


def _exclude_whole_numbers(schema: Any) -> None:
    """Moves a whole number that is excluded inward where some opposite bound has the same whole part."""
    found = [
        (part, keyword, part[keyword])
        for _, part in _schemas(schema, "")
        for keyword in _BOUNDS
        if _is_number(part.get(keyword))
    ]
    nearest: dict[tuple[int, int], float] = {}  # by direction and whole part: the size of the smallest
    for _, keyword, value in found:
        if value != int(value):
            key = _BOUNDS[keyword], int(value)
            nearest[key] = min(abs(value), nearest.get(key, math.inf))
    for part, keyword, value in found:
        direction = _BOUNDS[keyword]
        other = nearest.get((-direction, int(value)))
        if other is None or not keyword.startswith("exclusive") or value != int(value):
            continue
        if value * direction > 0:
            part[keyword] = math.nextafter(value, math.inf * direction)
        elif value == 0:  # next to which lie doubles of hundreds of digits
            part[keyword] = direction * max(10.0 ** (math.floor(math.log10(other)) - 17), 5e-324)


def _check_multiples(schema: Any, best_effort: bool) -> None:
    """Refuses multiples that may be combined and together pass 32 bits; best_effort drops them."""
    found = [s for _, s in _schemas(schema, "") if _is_number(s.get("multipleOf"))]
    multiples = {abs(Decimal(repr(s["multipleOf"]))) for s in found}
    is_combined = any("allOf" in s or "$ref" in s for _, s in _schemas(schema, ""))
    if len(multiples) < 2 or not is_combined:
        return
    exponent = min(0, *(int(multiple.as_tuple().exponent) for multiple in multiples))
    if math.prod(int(multiple.scaleb(-exponent)) for multiple in multiples) < 2**32:
        return
    if not best_effort:
        raise SchemaRefused("multipleOf: the values together are too large to be combined")
    for part in found:
        del part["multipleOf"]


def _check_references(schema: Any) -> None:
    """Refuses a schema that is itself, by references and combiners alone, which says nothing of an answer."""
    under_way: set[int] = set()
    done: set[int] = set()

    def visit(part: Any) -> None:
        if not isinstance(part, dict) or id(part) in done:
            return
        if id(part) in under_way:
            raise SchemaRefused("$ref: a schema refers to itself, with nothing of an answer in between")
        under_way.add(id(part))
        if isinstance(part.get("$ref"), str):
            visit(_referred(schema, part["$ref"]))
        for combiner in _COMBINERS:
            if isinstance(part.get(combiner), list):
                for option in part[combiner]:
                    visit(option)
        under_way.remove(id(part))
        done.add(id(part))

    for _, found in _schemas(schema, ""):
        visit(found)


def _referred(schema: Any, reference: str) -> Any:
    """The value that a JSON pointer points to in the schema; None where nothing is, or it points
    elsewhere."""
    if not reference.startswith("#"):
        return None
    found = schema
    for step in unquote(reference[1:]).split("/")[1:]:
        key = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict):
            found = found.get(key)
        elif isinstance(found, list) and key.isdecimal() and int(key) < len(found):
            found = found[int(key)]
        else:
            return None
    return found


def _has_controls(schema: dict[str, Any]) -> bool:
    values = [*_leaves(schema.get("const")), *_leaves(schema.get("enum"))]
    if any(isinstance(value, str) and _CONTROL.search(value) for value in values):
        return True
    pattern = schema.get("pattern")
    patterns = [pattern] if isinstance(pattern, str) else []
    if isinstance(schema.get("patternProperties"), dict):
        patterns += schema["patternProperties"]
    return any(map(_CONTROL_IN_PATTERN.search, patterns))


def _narrow_patterns(schema: Any) -> None:
    """Takes one control character, \\x01, out of the classes in patterns that may have all of them."""
    for _, found in _schemas(schema, ""):
        if isinstance(found.get("pattern"), str):
            found["pattern"] = narrowed(found["pattern"])
        if isinstance(found.get("patternProperties"), dict):
            keyed = found["patternProperties"].items()
            found["patternProperties"] = {narrowed(pattern): part for pattern, part in keyed}


def _check_keys(schema: Any) -> None:
    """Refuses a schema whose declared keys could come again, spelled with \\u, as ones not declared."""
    for place, found in _schemas(schema, ""):
        has_declared = bool(found.get("properties") or found.get("required"))
        if has_declared and found.get("additionalProperties") is not False:
            raise SchemaRefused(
                f"{place}additionalProperties: beside strings with control characters it must be false, "
                "since a key could come again, spelled with \\u"
            )
