"""Objects that declare properties have no others, unless the schema speaks of them."""

import json
from collections.abc import Iterator
from random import Random
from typing import Any

import jsonschema
import pytest

from replicas.closed_objects import close_objects
from tests.replicas.tools.schemas import pydantic_model
from tests.thorough import num_cases

A = {"type": "object", "properties": {"a": {"type": "integer"}}}
B = {"type": "object", "properties": {"b": {"type": "integer"}}, "required": ["b"]}
CLOSED = {"additionalProperties": False}


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(schema))
    close_objects(found)
    return found


@pytest.mark.parametrize(
    "wrap",
    [
        lambda inner: inner,
        lambda inner: {"items": inner},
        lambda inner: {"prefixItems": [{"type": "null"}, inner]},
        lambda inner: {"anyOf": [inner, {"type": "null"}]},
        lambda inner: {"additionalProperties": inner},
        lambda inner: {"patternProperties": {"^x": inner}},
        lambda inner: {"$ref": "#/$defs/d", "$defs": {"d": inner}},
        lambda inner: {"items": {"$ref": "#/definitions/d"}, "definitions": {"d": inner}},
    ],
)
def test_an_object_that_stands_for_itself_is_closed(wrap: Any) -> None:
    for inner in (A, B):
        assert closed(wrap(inner)) == wrap(inner | CLOSED)


@pytest.mark.parametrize(
    "schema",
    [
        A | {"additionalProperties": True},
        A | {"additionalProperties": {"type": "string"}},
        A | {"patternProperties": {"^x": {}}},
        A | {"minProperties": 2},
        A | {"required": ["other"]},
        A | {"anyOf": [B, {"required": ["c"]}]},
        {"type": "object"},
        {"type": "object", "properties": {}},
        {"allOf": [A, B]},
        {"oneOf": [A, B]},
        {"not": A},
        {"if": A, "then": B},
        {"dependentSchemas": {"c": A}},
        {"contains": A},
        {"properties": {"c": {"const": A}}, "additionalProperties": True},
        {"allOf": [{"$ref": "#/$defs/d"}, B], "$defs": {"d": A}},
        {"allOf": [{"$ref": "#/$defs/e"}, B], "$defs": {"d": A, "e": {"$ref": "#/$defs/d"}}},
        {"$ref": "#/$defs/d", "properties": {"c": {}}, "$defs": {"d": A}},
        {"items": A, "contains": {"$ref": "#/items"}},
    ],
    ids=json.dumps,
)
def test_what_speaks_of_others_or_applies_with_others_stays_as_it_is(schema: dict[str, Any]) -> None:
    assert closed(schema) == schema


def test_a_definition_is_closed_beside_one_that_is_not() -> None:
    schema = {
        "properties": {"c": {"allOf": [{"$ref": "#/$defs/d"}, B]}, "e": {"$ref": "#/$defs/e"}},
        "$defs": {"d": A, "e": B},
    }
    assert closed(schema) == schema | CLOSED | {"$defs": {"d": A, "e": B | CLOSED}}


def test_every_object_of_a_pydantic_model_is_closed() -> None:
    num_objects = 0
    for seed in range(num_cases(60)):
        schema = pydantic_model(Random(seed)).model_json_schema()
        found = closed(schema)
        jsonschema.Draft202012Validator.check_schema(found)
        objects = [part for part in parts(found) if part.get("properties")]
        num_objects += len(objects)
        assert all(part["additionalProperties"] is False for part in objects)
    assert num_objects > 60


def parts(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        if isinstance(value.get("type"), str):
            yield value
        for inner in value.values():
            yield from parts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from parts(inner)
