"""What `propertyNames` says is said in other keywords: the same objects are allowed, and only those."""

import json
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import jsonschema
import pytest

from replicas.json_schema import SchemaRefused, enforceable
from tests.replicas.test_grammar import grammar_of
from tests.replicas.test_schema_walks import walk

NUMBERS = {"type": "object", "additionalProperties": {"type": "integer"}}
KEYS = ("a", "b", "ab", "abc", "", "é1")
DEFINED = {"$defs": {"Key": {"enum": ["a", "ab"], "title": "Key", "type": "string"}}}
SPELLED = [
    NUMBERS | {"propertyNames": {"enum": ["a", "é1"]}},
    NUMBERS | {"propertyNames": {"type": "string", "enum": ["a", "b"]}, "required": ["b", "a"]},
    NUMBERS | {"propertyNames": {"const": "ab"}},
    NUMBERS | {"propertyNames": {"$ref": "#/$defs/Key"}} | DEFINED,
    NUMBERS | {"propertyNames": {"enum": ["a", "b"]}, "properties": {"a": {"type": "null"}}},
    {"type": "object", "propertyNames": {"enum": ["b"]}, "maxProperties": 1},
    NUMBERS | {"propertyNames": {"pattern": "^a"}},
    NUMBERS | {"propertyNames": {"minLength": 2}},
    NUMBERS | {"propertyNames": {"maxLength": 1, "title": "Short"}},
    NUMBERS | {"propertyNames": {"type": "string"}},
    {"type": "object", "propertyNames": True},
    {"type": "array", "items": NUMBERS | {"propertyNames": {"enum": ["a"]}}},
]


def objects() -> Iterator[dict[str, Any]]:
    for count in range(3):
        for keys in combinations(KEYS, count):
            for value in (1, None):
                yield dict.fromkeys(keys, value)


def is_valid(schema: dict[str, Any], value: Any) -> bool:
    return bool(jsonschema.Draft202012Validator(schema).is_valid(value))


@pytest.mark.parametrize("schema", SPELLED, ids=json.dumps)
def test_the_same_objects_are_allowed(schema: dict[str, Any]) -> None:
    spelled = json.loads(enforceable(json.dumps(schema), best_effort=False).schema)
    assert '"propertyNames"' not in json.dumps(spelled)
    for value in objects():
        for whole in (value, [value]):
            assert is_valid(spelled, whole) == is_valid(schema, whole), value


@pytest.mark.parametrize("schema", SPELLED, ids=json.dumps)
def test_what_the_grammar_allows_validates(schema: dict[str, Any]) -> None:
    texts = [text for seed in range(20) if (text := walk(schema, seed)) is not None]
    assert texts
    for text in texts:
        assert is_valid(schema, json.loads(text)), text


@pytest.mark.parametrize(
    "schema",
    [
        NUMBERS | {"propertyNames": {"format": "date"}},
        NUMBERS | {"propertyNames": {"enum": ["a"]}, "required": ["b"]},
        NUMBERS | {"propertyNames": {"enum": ["a"]}, "patternProperties": {"^b": {}}},
        NUMBERS | {"propertyNames": {"pattern": "^a"}, "properties": {"b": {}}},
        NUMBERS | {"propertyNames": {"$ref": "#/$defs/a"}, "$defs": {"a": {"$ref": "#/$defs/a"}}},
        {"propertyNames": {"enum": [*map(str, range(600))]}, "additionalProperties": {"const": "a" * 600}},
        {"propertyNames": 7},
        {"propertyNames": {"enum": 7}},
    ],
    ids=lambda schema: json.dumps(schema)[:80],
)
def test_others_stay_and_are_refused(schema: dict[str, Any]) -> None:
    try:
        kept = json.loads(enforceable(json.dumps(schema), best_effort=False).schema)
    except SchemaRefused:
        return
    assert kept["propertyNames"] == schema["propertyNames"]
    with pytest.raises(Exception, match=r"propertyNames|refers to itself"):
        grammar_of({"type": "object"} | schema)
