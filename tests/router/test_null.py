"""Null in fields that may be left out, of chats, texts and what is tokenized."""

from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from router.apis.tokens import DetokenizeBody, TokenizeBody
from router.completion import StreamOptions
from router.decoding import Decoding
from router.schema import ChatCompletionRequest, CompletionRequest
from tests.router.test_schema import CHAT

CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
STRUCTURE = {"begin": "<f>", "schema": {"type": "object"}}
TAG = {"type": "structural_tag", "triggers": ["<f"]}


def models_in(annotation: Any, found: dict[type[BaseModel], None]) -> dict[type[BaseModel], None]:
    """The models of which a field may hold one, and those of their fields, in turn."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel) and annotation not in found:
        found[annotation] = None
        for field in annotation.model_fields.values():
            models_in(field.annotation, found)
    for part in get_args(annotation):
        models_in(part, found)
    return found


BODIES = ChatCompletionRequest | CompletionRequest | TokenizeBody | DetokenizeBody
OPTIONAL = [
    pytest.param(model, field.alias or name, id=f"{model.__name__}.{name}")
    for model in models_in(BODIES, {})
    for name, field in model.model_fields.items()
    if not field.is_required()
]


@pytest.mark.parametrize(("model", "name"), OPTIONAL)
def test_null_is_taken_for_whatever_may_be_left_out(model, name):
    faults: list[Any] = []
    try:
        model.model_validate({name: None})
    except ValidationError as error:  # of what is missing
        faults = [place for problem in error.errors() for place in problem["loc"]]
    assert name not in faults


@pytest.mark.parametrize(
    ("body", "without"),
    [
        ({"ignore_eos": None}, {}),
        ({"decoding": dict.fromkeys(Decoding.model_fields)}, {"decoding": {}}),
        ({"stream": True, "stream_options": dict.fromkeys(StreamOptions.model_fields)}, {"stream": True}),
        (
            {"messages": [{"role": "assistant", "tool_calls": [CALL | {"type": None}]}]},
            {"messages": [{"role": "assistant", "tool_calls": [CALL]}]},
        ),
        (
            {"structured_outputs": {"structural_tag": TAG | {"structures": [STRUCTURE | {"end": None}]}}},
            {"structured_outputs": {"structural_tag": TAG | {"structures": [STRUCTURE]}}},
        ),
    ],
)
def test_null_asks_for_what_leaving_it_out_does(body, without):
    def asked(more: dict[str, Any]) -> tuple[Any, ...]:
        request = ChatCompletionRequest.model_validate(CHAT | more)
        return (
            request.sampling(lambda: 7),
            request.decoding_options(),
            request.prompts_for_replica(),
            request.include_usage,
            request.continuous_usage,
        )

    assert asked(body) == asked(without)
