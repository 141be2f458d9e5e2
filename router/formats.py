"""Fields that give an answer its form: OpenAI's `response_format`."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from replicas.messages import JsonFormat
from router.fields import Strict, conflict

MAX_SCHEMA_LEN = 64 * 1024


class JsonSchemaFormat(Strict):
    """A JSON schema that the answer keeps to."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None
    """False leaves out what of the schema can't be enforced; otherwise that is an error."""

    @field_validator("schema_")
    @classmethod
    def _is_json(cls, schema: dict[str, Any]) -> dict[str, Any]:
        """The schema, if short enough and fit to be sent on: Python takes more for JSON than JSON is."""
        try:
            length = len(json.dumps(schema, allow_nan=False, ensure_ascii=False).encode())
        except RecursionError:
            raise PydanticCustomError("schema", "The schema is nested too deeply") from None
        except UnicodeEncodeError:
            raise PydanticCustomError("schema", "The schema has a lone surrogate") from None
        except ValueError as error:  # a number that overflows, or has thousands of digits
            message = "The schema can't be written as JSON: {error}"
            raise PydanticCustomError("schema", message, {"error": str(error)}) from None
        if length > MAX_SCHEMA_LEN:
            raise PydanticCustomError("schema", "A schema has at most {most} bytes", {"most": MAX_SCHEMA_LEN})
        return schema


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> Self:
        if (self.json_schema is None) == (self.type == "json_schema"):
            raise conflict("json_schema", "goes with type 'json_schema', and only with it")
        return self

    def json_format(self) -> JsonFormat | None:
        if self.json_schema is not None:
            return JsonFormat(json.dumps(self.json_schema.schema_), self.json_schema.strict is False)
        return JsonFormat('{"type": "object"}') if self.type == "json_object" else None
