"""Fields that say what comes back: log-probabilities, choices, formats."""

import json

import pytest

from router.schema import ChatCompletionRequest, CompletionRequest
from tests.router.test_schema import CHAT, TEXT, error_of, post


@pytest.mark.parametrize(
    ("body", "num"),
    [
        ({}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 20}, 20),
        ({"logprobs": False}, None),
    ],
)
def test_logprobs_of_chat(body, num):
    assert ChatCompletionRequest.model_validate(CHAT | body).sampling(lambda: 0).logprobs == num


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/chat", {"top_logprobs": 2}, "top_logprobs"),
        ("/chat", {"logprobs": False, "top_logprobs": 2}, "top_logprobs"),
        ("/chat", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ("/chat", {"logprobs": 1}, "logprobs"),
        ("/text", {"logprobs": 6}, "logprobs"),
        ("/text", {"logprobs": True}, "logprobs"),
        ("/text", {"best_of": 2}, "best_of"),
        ("/text", {"best_of": 1, "n": 2}, "best_of"),
        ("/chat", {"decoding": {"mode": "ar", "max_steps": 2}}, "decoding.max_steps"),
        ("/chat", {"decoding": {"lossless": True, "max_steps": 2}}, "decoding.max_steps"),
        ("/chat", {"decoding": {"max_steps": 0}}, "decoding.max_steps"),
    ],
)
async def test_what_does_not_go_together_is_named(path, body, param):
    base = CHAT if path == "/chat" else TEXT
    assert error_of(await post(path, base | body))["param"] == param


def test_logprobs_and_choices_of_completions():
    request = CompletionRequest.model_validate(TEXT | {"logprobs": 0, "n": 2, "best_of": 2})
    assert (request.sampling(lambda: 0).logprobs, request.n) == (0, 2)


PERSON = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
NAMED = {"name": "person", "schema": PERSON}


@pytest.mark.parametrize(
    ("given", "schema", "best_effort"),
    [
        (None, None, False),
        ({"type": "json_schema", "json_schema": NAMED | {"strict": None}}, PERSON, True),
        ({"type": "text"}, None, False),
        ({"type": "json_object"}, {"type": "object"}, False),
        ({"type": "json_schema", "json_schema": NAMED}, PERSON, True),
        ({"type": "json_schema", "json_schema": NAMED | {"strict": True, "description": "x"}}, PERSON, False),
        ({"type": "json_schema", "json_schema": NAMED | {"strict": False}}, PERSON, True),
    ],
)
@pytest.mark.parametrize(("cls", "base"), [(ChatCompletionRequest, CHAT), (CompletionRequest, TEXT)])
def test_response_formats(cls, base, given, schema, best_effort):
    found = cls.model_validate(base | {"response_format": given}).sampling(lambda: 0).response_format
    if schema is None:
        assert found is None
    else:
        assert (json.loads(found.schema), found.best_effort) == (schema, best_effort)
        assert list(json.loads(found.schema)) == list(schema)  # properties are written in the schema's order


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ("json", "response_format"),
        ({}, "response_format.type"),
        ({"type": "xml"}, "response_format.type"),
        ({"type": "json_schema"}, "response_format.json_schema"),
        ({"type": "json_object", "json_schema": NAMED}, "response_format.json_schema"),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, "response_format.json_schema.schema"),
        ({"type": "json_schema", "json_schema": {"schema": PERSON}}, "response_format.json_schema.name"),
        (
            {"type": "json_schema", "json_schema": NAMED | {"name": "two words"}},
            "response_format.json_schema.name",
        ),
        (
            {"type": "json_schema", "json_schema": NAMED | {"schema": {"enum": ["x" * 70_000]}}},
            "response_format.json_schema.schema",
        ),
        (
            {"type": "json_schema", "json_schema": NAMED | {"strict": "yes"}},
            "response_format.json_schema.strict",
        ),
    ],
)
async def test_a_bad_response_format_is_named(given, param):
    assert error_of(await post("/chat", CHAT | {"response_format": given}))["param"] == param


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity"])
async def test_a_schema_with_a_number_that_overflows_is_named(number):
    body = CHAT | {
        "response_format": {"type": "json_schema", "json_schema": NAMED | {"schema": {"enum": [0]}}}
    }
    text = json.dumps(body).replace("[0]", f"[{number}]")
    error = error_of(await post("/chat", text.encode()))
    assert error["param"] == "response_format.json_schema.schema"


@pytest.mark.parametrize("schema", [{"enum": ["\ud800"]}, {"properties": {"a\udfff": {}}}])
async def test_a_schema_with_a_lone_surrogate_is_named(schema):
    given = {"type": "json_schema", "json_schema": NAMED | {"schema": schema}}
    error = error_of(await post("/chat", CHAT | {"response_format": given}))
    assert error["param"] == "response_format.json_schema.schema"
    assert "surrogate" in error["message"]
