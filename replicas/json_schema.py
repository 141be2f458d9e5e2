"""What llguidance would get wrong of a JSON schema: put right before it sees it, or refused.

llguidance (1.9.1) keeps every number as a double, forms the least common multiple of two `multipleOf` in
32 bits, and takes options of its own from a schema. Its grammars are context-free, so they can't tell that
a key has come before.
"""

import json
import math
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

MAX_EXACT = 2**53
"""Up to here every integer is a double."""
MAX_BOUND = 2**63 - 1024
"""The largest double within 64 bits."""
_BOUNDS = {"minimum": 1, "exclusiveMinimum": 1, "maximum": -1, "exclusiveMaximum": -1}
_OF_NAMES = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
"""Keywords whose value has names for keys, and schemas for values."""
_NOTES = frozenset({"default", "examples", "title", "description", "$comment"})
_OPTIONS = "x-guidance"


class SchemaRefused(Exception):
    """A schema can't be enforced. Its text says what of it, and follows "the schema can't be enforced: "."""


def enforceable(text: str, best_effort: bool) -> str:
    """The schema, such that each answer which llguidance then allows is one that `text` allows.

    Integer bounds beyond 2**53 move inward to the next double, by at most 1,023. What can't be enforced is
    left out with best_effort, and is otherwise SchemaRefused.
    """
    try:
        schema = json.loads(text)
        if isinstance(schema, dict):
            schema.pop(_OPTIONS, None)  # no keyword of JSON Schema, so it has no meaning
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
        return json.dumps(schema)
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
            if has_names or not (key in _NOTES or key in ("const", "enum")):
                yield from _schemas(item, f"{place}{key}.", not has_names and key in _OF_NAMES)


def _problem(schema: dict[str, Any], keyword: str) -> str | None:
    """Why a keyword can't be enforced, None where it can. Rounds bounds."""
    value = schema[keyword]
    if keyword in ("const", "enum"):
        for number in _numbers(value):
            if not _comes_out_exact(number):
                return f"{number} would come out rounded; numbers are kept as doubles"
    elif keyword in _BOUNDS and _is_number(value):
        if not math.isfinite(value) or not -(2**63) <= value < 2**63:
            return f"{value} is beyond 64 bits"
        if abs(value) > MAX_EXACT:
            schema[keyword] = _rounded(int(value), _BOUNDS[keyword])
    elif keyword == "minProperties" and isinstance(value, int):
        required = schema.get("required")
        num_required = len(set(map(str, required))) if isinstance(required, list) else 0
        if value > num_required + 1:
            return (
                f"of {value} properties only {num_required} are required, and the others might be "
                "one that comes several times; require more, or lower it"
            )
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _numbers(value: Any) -> Iterator[int | float]:
    if isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _numbers(item)
    elif _is_number(value):
        yield value


def _comes_out_exact(number: int | float) -> bool:
    """llguidance writes a double as its shortest digits, without an exponent."""
    try:
        double = float(number)
    except OverflowError:
        return False
    return math.isfinite(double) and json.loads(format(Decimal(repr(double)), "f")) == number


def _rounded(bound: int, direction: int) -> int:
    """The nearest integer that is a double and lies in the direction from the bound, or on it."""
    double = float(bound)
    if (int(double) - bound) * direction < 0:  # it lies on the other side
        double = math.nextafter(double, math.inf * direction)
    return max(-MAX_BOUND, min(MAX_BOUND, int(double)))


def _check_multiples(schema: Any, best_effort: bool) -> None:
    """Of multiples that may be combined, in 32 bits."""
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
