"""Random schemas of tools' arguments, of the kinds that pydantic writes and that zod does."""

from enum import Enum
from random import Random
from typing import Annotated, Any, Literal, Optional

from pydantic import BaseModel, ConfigDict, Field, create_model

NAMES = ("city", "unit", "limit", "tags", "user_id", "isActive", "when", "filters", "query", "ünit")
WORDS = ("red", "green", "metric", "a b", "é", 'q"')


def pydantic_model(rng: Random, depth: int = 2) -> type[BaseModel]:
    fields: dict[str, Any] = {}
    for name in rng.sample(NAMES, rng.randint(0 if depth == 2 else 1, 4)):
        kind = _annotation(rng, depth)
        match rng.randrange(3):
            case 0:
                fields[name] = (kind, Field(description=f"The {name}."))
            case 1:
                fields[name] = (Optional[kind], None)  # noqa: UP045
            case _:
                fields[name] = (kind, ...)
    extra = rng.choice(["forbid", "ignore"])
    return create_model(f"Model{rng.randrange(10**6)}", __config__=ConfigDict(extra=extra), **fields)


def _annotation(rng: Random, depth: int) -> Any:
    choices: list[Any] = [
        str,
        int,
        float,
        bool,
        Annotated[int, Field(ge=rng.randint(-5, 0), le=rng.randint(1, 50))],
        Annotated[float, Field(gt=0, lt=rng.randint(1, 9))],
        Annotated[str, Field(max_length=rng.randint(1, 8))],
        Annotated[str, Field(pattern="^[A-Z]{2}-[0-9]{1,3}$")],
        Literal[tuple(rng.sample(WORDS, 2))],
        Enum("Unit", {f"m{k}": word for k, word in enumerate(rng.sample(WORDS, 3))}),  # type: ignore[misc]
    ]
    if depth:
        inner = _annotation(rng, depth - 1)
        choices += [
            list[inner],  # type: ignore[valid-type]
            dict[str, inner],  # type: ignore[valid-type]
            dict[Literal[tuple(rng.sample(WORDS, 2))], inner],  # type: ignore[misc,valid-type]
            dict[Annotated[str, Field(min_length=1, max_length=4)], inner],  # type: ignore[valid-type]
            Annotated[list[inner], Field(min_length=1, max_length=3)],  # type: ignore[valid-type]
            tuple[inner, int],  # type: ignore[valid-type]
            inner | int,
            pydantic_model(rng, depth - 1),
            pydantic_model(rng, depth - 1),
        ]
    return rng.choice(choices)


def zod_schema(rng: Random, depth: int = 2) -> dict[str, Any]:
    names = rng.sample(NAMES, rng.randint(0 if depth == 2 else 1, 4))
    found: dict[str, Any] = {
        "type": "object",
        "properties": {name: _zod(rng, depth) for name in names},
        "required": [name for name in names if rng.random() < 0.6],
        "additionalProperties": False,
    }
    if depth == 2:
        found["$schema"] = "http://json-schema.org/draft-07/schema#"
    return found


def _zod(rng: Random, depth: int) -> dict[str, Any]:
    choices: list[dict[str, Any]] = [
        {"type": "string", "description": "Some text."},
        {"type": "string", "minLength": 1, "maxLength": rng.randint(1, 6)},
        {"type": "string", "enum": rng.sample(WORDS, 3)},
        {"type": "string", "const": rng.choice(WORDS)},
        {"type": "number"},
        {"type": "integer", "exclusiveMinimum": 0, "maximum": 9007199254740991},
        {"type": "integer", "minimum": 1, "maximum": rng.randint(1, 100)},
        {"type": "boolean"},
        {"type": "boolean", "default": False},
        {"type": ["string", "null"]},
        {"anyOf": [{"type": "number"}, {"type": "null"}]},
        {"type": "string", "pattern": "^[a-z]+$"},
    ]
    if depth:
        inner = _zod(rng, depth - 1)
        choices += [
            {"type": "array", "items": inner},
            {"type": "array", "items": inner, "minItems": 1, "maxItems": 2},
            {"anyOf": [inner, {"type": "string"}]},
            {"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": inner},
            {
                "type": "object",
                "propertyNames": {"type": "string", "enum": ["x", "y"]},
                "additionalProperties": inner,
                "required": ["x", "y"],
            },
            {"type": "array", "minItems": 2, "maxItems": 2, "items": [inner, {"type": "integer"}]},
            zod_schema(rng, depth - 1),
            zod_schema(rng, depth - 1),
        ]
    return rng.choice(choices)
