"""A chat's messages, and what a request says of how the chat template renders them."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from router.fields import NoList, Strict, Text, Unsupported, conflict

MAX_TEMPLATE_KWARGS_LEN = 16 * 1024

_PART_TEXTS = {"text": "text", "refusal": "refusal"}
"""Types of content parts, each with the field that has its text."""


def _text(value: Any) -> Any:
    """The content, whose text parts are concatenated where it is a list.

    What else a part says (`cache_control` and such) asks for nothing that shows in the answer.
    """
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        type_ = part.get("type") if isinstance(part, dict) else None
        field = _PART_TEXTS.get(type_) if isinstance(type_, str) else None
        if field is None:
            raise PydanticCustomError(
                "unsupported_value", "Only content parts of type 'text' (or 'refusal') are supported."
            )
        if not isinstance(part.get(field), str):
            message = "A part of type '{type}' has a string '{type}'"
            raise PydanticCustomError("text_part", message, {"type": field})
        texts.append(part[field])
    return "".join(texts)


class Message(Strict):
    """One message; an answer's can be sent back as it came."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Text | None, BeforeValidator(_text, json_schema_input_type=Text | list[dict[str, Any]] | None)
    ] = None
    name: Text | None = None
    refusal: Text | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    """vLLM's newer name for reasoning_content."""
    audio: Unsupported = None
    function_call: Unsupported = None
    tool_call_id: Unsupported = None
    tool_calls: NoList = None
    annotations: NoList = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise conflict("content", f"A message of role '{self.role}' has a content")
        return self

    def for_template(self) -> dict[str, str]:
        """The message as chat templates know it: OpenAI renamed `system` to `developer`, they did not."""
        content = self.refusal if self.content is None else self.content
        message = {"role": "system" if self.role == "developer" else self.role, "content": content or ""}
        reasoning = self.reasoning_content or self.reasoning
        return message | {
            key: value
            for key, value in (("name", self.name), ("reasoning_content", reasoning))
            if value is not None
        }

    @property
    def num_chars(self) -> int:
        return 1 + sum(map(len, self.for_template().values()))


def _as_json(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The variables, if they can be sent on: Python takes more for JSON than JSON is."""
    try:
        length = len(json.dumps(kwargs, allow_nan=False, ensure_ascii=False).encode())
    except UnicodeEncodeError:
        raise PydanticCustomError("unicode", "A text has a lone surrogate") from None
    except (ValueError, RecursionError):
        raise PydanticCustomError("template", "The values can't be written as JSON") from None
    if length > MAX_TEMPLATE_KWARGS_LEN:
        message = "They have at most {most} bytes"
        raise PydanticCustomError("too_long", message, {"most": MAX_TEMPLATE_KWARGS_LEN})
    return kwargs


TemplateKwargs = Annotated[dict[str, Any], AfterValidator(_as_json)]
ReasoningEffort = Annotated[Text, Field(min_length=1, max_length=32)]
