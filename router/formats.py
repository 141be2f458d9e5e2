"""Fields that give an answer its form: OpenAI's `response_format`, vLLM's `structured_outputs`."""

import json
import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from replicas.answer_forms import GrammarFormat, GrammarKind, JsonFormat
from router.fields import Strict, Text, at_most, conflict, json_len, read_json

MAX_SCHEMA_LEN = 64 * 1024
MAX_REGEX_LEN = 16 * 1024
MAX_GRAMMAR_LEN = 64 * 1024
MAX_CHOICES_TO_MAKE = 1024
MAX_CHOICE_LEN = 1024
MAX_STRUCTURES = 64
MAX_WHITESPACE_LEN = 100
_BLANKS = re.compile(
    r"(?:(?: |\\[nrts]|[\n\r\t]|\[(?: |\\[nrt]|[\n\r\t])+\])(?:[?*+]|\{[0-9]{1,2}(?:,[0-9]{0,2})?\})?)+"
)
"""Patterns of white space, which nothing else of JSON can be taken for."""
ANY_OBJECT = '{"type": "object"}'


def sendable(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema, if short enough and fit to be sent on: Python takes more for JSON than JSON is."""
    if json_len(schema, "The schema") > MAX_SCHEMA_LEN:
        raise PydanticCustomError("schema", "A schema has at most {most} bytes", {"most": MAX_SCHEMA_LEN})
    return schema


class JsonSchemaFormat(Strict):
    """A JSON schema that the answer keeps to."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None
    """True makes what of the schema can't be enforced an error; otherwise it is left out, with a warning."""

    @field_validator("schema_")
    @classmethod
    def _is_json(cls, schema: dict[str, Any]) -> dict[str, Any]:
        return sendable(schema)


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
            return JsonFormat(json.dumps(self.json_schema.schema_), self.json_schema.strict is not True)
        return JsonFormat(ANY_OBJECT) if self.type == "json_object" else None


class Structure(Strict):
    begin: Annotated[Text, Field(min_length=1, max_length=256)]
    schema_: Annotated[dict[str, Any], Field(alias="schema"), AfterValidator(sendable)]
    end: Annotated[Text, Field(max_length=256)] | None = None


class StructuralTag(Strict):
    """Text in which each trigger begins a structure: begin, a value of the schema, end."""

    type: Literal["structural_tag"]
    structures: Annotated[list[Structure], Field(min_length=1), at_most(MAX_STRUCTURES)]
    triggers: Annotated[
        list[Annotated[Text, Field(min_length=1, max_length=256)]],
        Field(min_length=1),
        at_most(MAX_STRUCTURES),
    ]


def _loaded(value: Any) -> Any:
    """The value of a field that vLLM takes as JSON or as its text."""
    if not isinstance(value, str):
        return value
    try:
        return read_json(value)
    except ValueError as error:
        message = "It can't be read as JSON: {error}"
        raise PydanticCustomError("json", message, {"error": str(error)}) from None


LOADED = BeforeValidator(_loaded)
_KINDS = ("regex", "choice", "grammar", "structural_tag")


class StructuredOutputs(Strict):
    """vLLM's orders for the form of an answer, one of which is given."""

    json_: Annotated[
        Annotated[dict[str, Any], AfterValidator(sendable)] | None, Field(alias="json"), LOADED
    ] = None
    json_object: bool | None = None
    regex: Annotated[Text, Field(min_length=1, max_length=MAX_REGEX_LEN)] | None = None
    choice: (
        Annotated[
            list[Annotated[Text, Field(min_length=1, max_length=MAX_CHOICE_LEN)]],
            Field(min_length=1),
            at_most(MAX_CHOICES_TO_MAKE),
        ]
        | None
    ) = None
    grammar: Annotated[Text, Field(min_length=1, max_length=MAX_GRAMMAR_LEN)] | None = None
    structural_tag: Annotated[StructuralTag | None, LOADED] = None
    disable_any_whitespace: bool | None = None
    """Blanks are fixed anyway where whitespace_pattern does not say otherwise."""
    whitespace_pattern: Annotated[Text, Field(min_length=1, max_length=MAX_WHITESPACE_LEN)] | None = None
    """A regex of blanks, line ends and tabs: what may stand between tokens of JSON."""

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        given = self.given
        if len(given) != 1:
            names = ", ".join(given) or "none"
            raise conflict(
                given[1] if given else "json",
                f"Exactly one of json, json_object, regex, choice, grammar, structural_tag is to be given, "
                f"not {names}",
            )
        return self

    @model_validator(mode="after")
    def _has_blanks_for_json(self) -> Self:
        pattern = self.whitespace_pattern
        if pattern is None:
            return self
        if self.disable_any_whitespace or self.given[0] not in ("json", "json_object"):
            raise conflict(
                "whitespace_pattern", "it goes with json or json_object, where blanks are not disabled"
            )
        if not _BLANKS.fullmatch(pattern):
            raise conflict("whitespace_pattern", "only of blanks, \\n, \\r, \\t and how often: [ \\n]{0,4}")
        return self

    @property
    def given(self) -> list[str]:
        names = [name for name in _KINDS if getattr(self, name) is not None]
        return ["json"] * (self.json_ is not None) + ["json_object"] * bool(self.json_object) + names

    def form(self) -> JsonFormat | GrammarFormat:
        (name,) = self.given
        if name == "json":
            return JsonFormat(json.dumps(self.json_), True, self.whitespace_pattern)
        if name == "json_object":
            return JsonFormat(ANY_OBJECT, whitespace=self.whitespace_pattern)
        value = getattr(self, name)
        if isinstance(value, StructuralTag):
            value = value.model_dump_json(by_alias=True)
        elif isinstance(value, list):
            value = json.dumps(value)
        return GrammarFormat(GrammarKind(name), value)
