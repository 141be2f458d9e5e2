"""What /openapi.json says beyond the bodies' fields: answers, streams, errors as they are sent, the key."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI

_ERROR = {"$ref": "#/components/schemas/Error"}
_JSON_OBJECT = {"type": "object", "additionalProperties": True}
_SCHEMAS: Mapping[str, Any] = {
    "Error": {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": {"type": ["string", "null"], "description": "The field at fault."},
                    "code": {"type": ["string", "null"]},
                },
            }
        },
    },
    "CompletionAnswer": {
        "type": "object",
        "required": ["id", "object", "created", "model", "choices", "usage", "decoding"],
        "properties": {
            "id": {"type": "string"},
            "object": {"enum": ["chat.completion", "text_completion"]},
            "created": {"type": "integer"},
            "model": {"type": "string"},
            "service_tier": {"type": "string"},
            "choices": {"type": "array", "items": {"$ref": "#/components/schemas/Choice"}},
            "usage": {"$ref": "#/components/schemas/Usage"},
            "decoding": _JSON_OBJECT,
        },
    },
    "Choice": {
        "type": "object",
        "required": ["index", "finish_reason"],
        "properties": {
            "index": {"type": "integer"},
            "finish_reason": {"enum": ["stop", "length", "tool_calls"]},
            "stop_reason": {"type": ["string", "integer"]},
            "message": _JSON_OBJECT,
            "text": {"type": "string"},
            "logprobs": {"type": ["object", "null"]},
            "token_ids": {"type": "array", "items": {"type": "integer"}},
        },
    },
    "Usage": {
        "type": "object",
        "required": ["prompt_tokens", "completion_tokens", "total_tokens"],
        "properties": {
            "prompt_tokens": {"type": "integer"},
            "completion_tokens": {"type": "integer"},
            "total_tokens": {"type": "integer"},
            "prompt_tokens_details": _JSON_OBJECT,
        },
    },
}

_MEANINGS = {
    400: "The body can't be served as it stands; `param` names the field.",
    401: "No API key, or an unknown one.",
    403: "The key may not do this.",
    404: "There is no such model, or path.",
    408: "The body was not whole in time.",
    413: "The body is too large.",
    415: "The body's Content-Encoding is not supported.",
    429: "All places are taken, or a key's limit is; Retry-After says when to come again.",
    431: "The headers are too large.",
    500: "The server failed.",
    503: "No replica can be reached, or the server drains.",
    504: "The request's own `timeout_s` was up.",
}

Responses = dict[int | str, dict[str, Any]]


def _errors(*statuses: int) -> Responses:
    """The answers of these statuses; `default` is any other, so that FastAPI adds none of its own."""
    told: dict[int | str, str] = {status: _MEANINGS[status] for status in statuses}
    told["default"] = "Any other error."
    content = {"application/json": {"schema": _ERROR}}
    return {status: {"description": what, "content": content} for status, what in told.items()}


def _answer(content: Mapping[str, Any], description: str) -> Responses:
    return {200: {"description": description, "content": {k: {"schema": v} for k, v in content.items()}}}


COMPLETION_RESPONSES: Responses = _errors(400, 401, 404, 408, 413, 415, 429, 431, 500, 503, 504) | _answer(
    {
        "application/json": {"$ref": "#/components/schemas/CompletionAnswer"},
        "text/event-stream": {
            "type": "string",
            "description": "With `stream: true`: `data:` lines of OpenAI's chunks, then `data: [DONE]`; "
            "or, at a failure, `event: error` with a `data:` line of an Error.",
        },
    },
    "The completion, whole or as a stream.",
)
MODEL_RESPONSES: Responses = _errors(401, 404, 431) | _answer(
    {"application/json": _JSON_OBJECT}, "The model."
)
OTHER_RESPONSES: Responses = _errors(401, 431, 503) | _answer(
    {"application/json": _JSON_OBJECT}, "As docs/api.md has it."
)
POLICY_RESPONSES: Responses = _errors(400, 401, 403, 408, 413, 415, 431, 503) | _answer(
    {"application/json": _JSON_OBJECT},
    "The policy in force and the configured one, as docs/operate.md has it.",
)
TOKENS_RESPONSES: Responses = _errors(400, 401, 404, 408, 413, 415, 429, 431, 500, 503) | _answer(
    {"application/json": _JSON_OBJECT}, "As docs/api.md has it."
)


def streamed_responses(what: str) -> Responses:
    """The answers of a route whose answer is whole, or a stream of named events.

    what: the answer
    """
    errors = _errors(400, 401, 404, 408, 413, 415, 429, 431, 500, 503, 504)
    events = {"type": "string", "description": "With `stream: true`: named events; a failure is the last."}
    return errors | _answer({"application/json": _JSON_OBJECT, "text/event-stream": events}, what)


MESSAGES_RESPONSES = streamed_responses("Anthropic's message, whole or as a stream; so are errors.")
RESPONSES_RESPONSES = streamed_responses("OpenAI's response, whole or as a stream.")


def add_description(app: FastAPI) -> None:
    """Completes the document that FastAPI makes of the routes."""
    make = app.openapi

    def described() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = make()
            components = document.setdefault("components", {})
            components.setdefault("schemas", {}).update(_SCHEMAS)
            for unsent in ("HTTPValidationError", "ValidationError"):
                components["schemas"].pop(unsent, None)
            components["securitySchemes"] = {
                "apiKey": {"type": "http", "scheme": "bearer"},
                "anthropicKey": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            }
            document["security"] = [{"apiKey": []}, {"anthropicKey": []}, {}]
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = described  # type: ignore[method-assign]
