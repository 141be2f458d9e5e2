"""Parts of fields: their kinds, their ranges, and how a fault in one is told."""

import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, ClassVar, Union

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainValidator,
    ValidationError,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError
from pydantic_core.core_schema import no_info_after_validator_function

from router.config import MAX_JSON_DEPTH

MAX_PROMPTS = 128
MAX_INT32 = 2**31 - 1
"""The most for token ids and counts of tokens, which tensors and records of other processes hold."""

# Possessive, and it takes an unterminated string to the end, so that no input makes it go back.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)


class Neutral:
    """Accepts null and the given values; anything else asks for what Triad can't do."""

    def __init__(self, *values: Any):
        self._values = values

    def _check(self, value: Any) -> None:
        if value is not None and not any(_same(value, known) for known in self._values):
            only = f" Leave it out or send {self._values[0]!r}." if self._values else ""
            message = "This parameter is not supported.{only}"
            raise PydanticCustomError("unsupported_parameter", message, {"only": only})

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"enum": [*self._values, None]}


class Replaced(Neutral):
    """Accepts null and the given value of a field in whose place another has come."""

    def __init__(self, newer: str, value: Any):
        super().__init__(value)
        self._newer = newer

    def _check(self, value: Any) -> None:
        if value is not None and not any(_same(value, known) for known in self._values):
            message = "OpenAI has replaced it; send '{newer}'."
            raise PydanticCustomError("unsupported_parameter", message, {"newer": self._newer})


def _same(value: Any, known: Any) -> bool:
    """True for equal values, where 1.0 is 1 but true isn't."""
    if isinstance(value, bool) or isinstance(known, bool):
        return value is known
    return bool(value == known)


Hint = Any
"""A field that may be taken without effect, since what it asks for shows in no answer: hints to caches,
storage and billing."""
Unsupported = Annotated[Any, Neutral()]
NoList = Annotated[Any, Neutral([])]
Off = Annotated[Any, Neutral(False)]


def unicode(text: str) -> str:
    """The text unless it has a lone surrogate, which JSON can carry but no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("unicode", "The text has a lone surrogate") from None
    return text


Text = Annotated[str, AfterValidator(unicode)]


def integral(value: Any) -> Any:
    """The value, with 4.0 as 4: it is an integer in JSON Schema."""
    return int(value) if type(value) is float and value.is_integer() else value


INTEGRAL = BeforeValidator(integral)
Count = Annotated[int, Field(ge=0, le=MAX_INT32), INTEGRAL]
PositiveCount = Annotated[int, Field(ge=1, le=MAX_INT32), INTEGRAL]


def json_depth(text: bytes) -> int:
    """The depth to which arrays and objects are nested in JSON; for anything else, some number."""
    brackets = np.frombuffer(_STRING.sub(b"", text), np.uint8) | 0x20
    # With bit 5 set '[' is '{' and ']' is '}'; no other byte of JSON outside strings is either.
    steps = (brackets == ord("{")).astype(np.int32) - (brackets == ord("}"))
    return int(np.max(np.cumsum(steps), initial=0))


def is_deeper(text: bytes, depth: int) -> bool:
    """True if JSON is nested deeper than that."""
    return text.count(b"[") + text.count(b"{") > depth and json_depth(text) > depth


def read_json(text: str) -> Any:
    """The value of JSON that stands in a string. ValueError for what is none, or nested too deep for those
    that send it on."""
    if is_deeper(text.encode(errors="surrogatepass"), MAX_JSON_DEPTH):
        raise ValueError(f"it is nested deeper than {MAX_JSON_DEPTH}")
    return json.loads(text)


def json_len(value: Any, what: str) -> int:
    """The bytes of a value's JSON. Raises PydanticCustomError for what is none, though Python takes it."""
    try:
        return len(json.dumps(value, allow_nan=False, ensure_ascii=False).encode())
    except RecursionError:
        raise PydanticCustomError("schema", "{what} is nested too deeply", {"what": what}) from None
    except UnicodeEncodeError:
        raise PydanticCustomError("schema", "{what} has a lone surrogate", {"what": what}) from None
    except ValueError as error:  # a number that overflows, or has thousands of digits
        message = "{what} can't be written as JSON: {error}"
        raise PydanticCustomError("schema", message, {"what": what, "error": str(error)}) from None


def at_most(most: int) -> BeforeValidator:
    """Counts members or items before any of them is looked at."""

    def check(value: Any) -> Any:
        if isinstance(value, dict | list) and len(value) > most:
            raise PydanticCustomError("too_many", "At most {most} are taken", {"most": most})
        return value

    return BeforeValidator(check)


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _knows_each_field(cls, data: Any) -> Any:
        """Names the first unknown field, so that a million of them cost no more than one.

        One that is null says nothing, and is left out.
        """
        if not isinstance(data, dict):
            return data
        known = _names_of(cls)
        unknown = data.keys() - known
        for name in data if unknown else ():
            if name in unknown and data[name] is not None:
                raise PydanticCustomError("unknown_field", "Unknown field", {"field": name})
        return {name: value for name, value in data.items() if name in known} if unknown else data


@cache
def _names_of(model: type[BaseModel]) -> frozenset[str]:
    """The names by which a body gives a model's fields."""
    return frozenset(field.alias or name for name, field in model.model_fields.items())


class Prompted(Strict):
    """A body with a prompt, whose length is bounded."""

    prompt_field: ClassVar[str]
    """The name of the field that holds the prompt."""

    @property
    def num_prompt_chars(self) -> int:
        """The characters of all prompts; a token id counts as one."""
        raise NotImplementedError

    @property
    def prompt_param(self) -> str:
        """The name of the field that holds this body's prompt, where there are several."""
        return self.prompt_field


def conflict(field: str, why: str) -> PydanticCustomError:
    """The error for two fields that don't go together; `field` is the one to change."""
    return PydanticCustomError("conflict", "{why}", {"field": field, "why": why})


def nested(error: ValidationError) -> PydanticCustomError:
    """The first fault of a part, as one of the whole: it is told by the field that has it, and not by every
    form that the part might have had."""
    problem = error.errors(include_url=False, include_input=False)[0]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"])
    field = problem.get("ctx", {}).get("field")
    where = (place + (f".{field}" if field else "")).lstrip(".")
    return conflict(where, problem["msg"])


def one_of(kinds: Mapping[str, type[BaseModel]], default: str | None = None) -> PlainValidator:
    """Takes an object of one of several kinds, by its `type`, which may be left out where there is a default.

    kinds: the class of each
    """

    def check(value: Any) -> Any:
        if isinstance(value, tuple(kinds.values())):
            return value
        kind = value.get("type", default) if isinstance(value, dict) else None
        model = kinds.get(kind) if isinstance(kind, str) else None
        if model is None:
            known = ", ".join(f"'{name}'" for name in kinds)
            message = "Only objects of these types are supported: {known}."
            raise PydanticCustomError("unsupported_value", message, {"known": known})
        try:
            return model.model_validate(value)
        except ValidationError as error:
            raise nested(error) from None

    return PlainValidator(check, json_schema_input_type=Union[tuple(kinds.values())])  # noqa: UP007


TextPrompt = str | tuple[int, ...]


def prompts(value: Any) -> tuple[TextPrompt, ...]:
    """The prompts of a request: text or token ids, alone or several in a list."""
    several = isinstance(value, list) and bool(value) and isinstance(value[0], str | list)
    found = value if several else [value]
    if len(found) > MAX_PROMPTS:
        raise PydanticCustomError("prompt", "At most {most} prompts a request", {"most": MAX_PROMPTS})
    return tuple(_prompt(prompt) for prompt in found)


def token_ids(value: Any) -> tuple[int, ...]:
    """The token ids of a list, which may be empty."""
    if value == []:
        return ()
    ids = _prompt(value) if isinstance(value, list) else None
    if not isinstance(ids, tuple):
        raise PydanticCustomError("prompt", "A list of token ids is wanted")
    return ids


def _prompt(value: Any) -> TextPrompt:
    if isinstance(value, str):
        return unicode(value)
    if isinstance(value, list) and value:
        # By C's own loops, since there may be a million.
        kinds = set(map(type, value))
        if kinds == {int, float} or kinds == {float}:
            value = list(map(integral, value))
            kinds = set(map(type, value))
        if kinds == {int}:
            if min(value) >= 0 and max(value) <= MAX_INT32:
                return tuple(value)
            raise PydanticCustomError("prompt", "A token id is from 0 to {most}", {"most": MAX_INT32})
    raise PydanticCustomError("prompt", "A prompt is a string or a list of token ids, or a list of these")
