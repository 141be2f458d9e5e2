"""Closes the objects of a JSON schema that declare properties and say nothing of others.

A schema by default allows any other property, which hardly anyone means: a program's types do not have them,
and a small model does not come to an end with them. All that is allowed still validates. Schemas of one value
(`allOf`, `oneOf` and the like) stay as they are: closed, one would refuse or no longer rule out what another
declares.
"""

from collections.abc import Iterator
from typing import Any

_SPEAK_OF_OTHERS = frozenset(
    {"additionalProperties", "patternProperties", "minProperties", "dependentRequired", "$ref", "anyOf"}
)
"""Keywords that may speak of properties which `properties` does not declare."""
_TOGETHER = frozenset(
    {
        "allOf",
        "oneOf",
        "not",
        "if",
        "then",
        "else",
        "dependentSchemas",
        "dependencies",
        "unevaluatedProperties",
    }
)
"""Keywords whose schemas all say something of one value, be it that they do not allow it."""
_ALTERNATIVES = frozenset({"$ref", "anyOf"})
_OF_OBJECTS = frozenset({"properties", "patternProperties", "additionalProperties", "required"})
_NAMED = ("properties", "patternProperties")
_LISTED = ("anyOf", "prefixItems", "items")
_DEFINITIONS = ("$defs", "definitions")
_DATA = frozenset({"const", "enum", "default", "examples"})


def close_objects(schema: Any) -> None:
    """Closes in place all objects of a schema that stand for themselves."""
    if not isinstance(schema, dict):
        return
    named = [(keyword, schema[keyword]) for keyword in _DEFINITIONS if isinstance(schema.get(keyword), dict)]
    definitions = {f"#/{keyword}/{name}": inner for keyword, group in named for name, inner in group.items()}
    alone: list[dict[str, Any]] = []
    together: list[Any] = []
    for part in (schema, *definitions.values()):
        _sort(part, alone, together)
    shared: set[str] = set()
    while together:
        found = set(_references(together.pop())) - shared
        if found - definitions.keys():
            return  # to a part of the schema that has no name
        shared |= found
        together += [definitions[reference] for reference in found]
    kept = {id(part) for reference in shared for part in _parts(definitions[reference])}
    for part in alone:
        if id(part) not in kept and _declares(part):
            part["additionalProperties"] = False


def _sort(schema: Any, alone: list[dict[str, Any]], together: list[Any]) -> None:
    """Adds to `alone` the schema and those in it to which no other applies as well, and the rest to
    `together`; not what the schema defines."""
    if not isinstance(schema, dict):
        return
    alternatives = _ALTERNATIVES & schema.keys()
    if _TOGETHER & schema.keys() or len(alternatives) > 1 or (alternatives and _OF_OBJECTS & schema.keys()):
        together.append({key: inner for key, inner in schema.items() if key not in _DEFINITIONS})
        return
    alone.append(schema)
    for keyword, inner in schema.items():
        if keyword in _NAMED and isinstance(inner, dict):
            inner = list(inner.values())
        if keyword in (*_NAMED, *_LISTED, "additionalProperties"):
            for part in inner if isinstance(inner, list) else (inner,):
                _sort(part, alone, together)
        elif keyword not in _DATA and keyword not in _DEFINITIONS and not isinstance(inner, str):
            together.append(inner)


def _declares(schema: dict[str, Any]) -> bool:
    properties, required = schema.get("properties"), schema.get("required", [])
    return (
        isinstance(properties, dict)
        and bool(properties)
        and not _SPEAK_OF_OTHERS & schema.keys()
        and isinstance(required, list)
        and set(map(str, required)) <= properties.keys()
    )


def _parts(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in it that may be a schema."""
    if isinstance(value, dict):
        yield value
        for keyword, inner in value.items():
            if keyword not in _DATA:
                yield from _parts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _parts(inner)


def _references(value: Any) -> Iterator[str]:
    for part in _parts(value):
        if isinstance(part.get("$ref"), str):
            yield part["$ref"]
