"""A chat's messages, and what a request says of how the chat template renders them."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from replicas.messages import TemplateOptions
from router.fields import Hint, NoList, PositiveCount, Strict, Text, Unsupported, conflict, json_len
from router.tools import CallId, FunctionCall, ToolCalls, calls_for_template

MAX_MESSAGES = 4096
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

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[
        Text | None, BeforeValidator(_text, json_schema_input_type=Text | list[dict[str, Any]] | None)
    ] = None
    name: Text | None = None
    refusal: Text | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    """vLLM's newer name for reasoning_content."""
    tool_calls: ToolCalls = None
    function_call: FunctionCall | None = None
    tool_call_id: CallId | None = None
    audio: Unsupported = None
    annotations: NoList = None
    cache_control: Hint = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise conflict("content", f"A message of role '{self.role}' has a content")
        return self

    @model_validator(mode="after")
    def _calls_or_answers_by_its_role(self) -> Self:
        for field in ("tool_calls", "function_call"):
            if getattr(self, field) is not None and self.role != "assistant":
                raise conflict(field, "only messages of the assistant have calls")
        calls_for_template(self.tool_calls, self.function_call)
        if self.role == "tool" and self.tool_call_id is None:
            raise conflict("tool_call_id", "a tool's result names the call that it answers")
        if self.role != "tool" and self.tool_call_id is not None:
            raise conflict("tool_call_id", "only a tool's result answers a call; its role is 'tool'")
        if self.role == "function" and self.name is None:
            raise conflict("name", "a function's result names the function")
        return self

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates know it: OpenAI renamed `system` to `developer`, and `function` to
        `tool`; they know the one's old name and the other's new one."""
        content = self.refusal if self.content is None else self.content
        role = {"developer": "system", "function": "tool"}.get(self.role, self.role)
        optional = {
            "name": self.name,
            "reasoning_content": self.reasoning_content or self.reasoning,
            "tool_call_id": self.name if self.role == "function" else self.tool_call_id,
        }
        message = {"role": role, "content": content or ""}
        message |= {key: value for key, value in optional.items() if value is not None}
        return message | calls_for_template(self.tool_calls, self.function_call)

    @property
    def num_chars(self) -> int:
        functions = [call.function for call in self.tool_calls or ()]
        if self.function_call is not None:
            functions.append(self.function_call)
        texts = (value for value in self.for_template().values() if isinstance(value, str))
        calls = sum(len(function.name + function.arguments) for function in functions)
        return 1 + sum(map(len, texts)) + calls


def _sendable(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The variables, if they can be sent on: Python takes more for JSON than JSON is."""
    if json_len(kwargs, "The object") > MAX_TEMPLATE_KWARGS_LEN:
        message = "They have at most {most} bytes"
        raise PydanticCustomError("too_long", message, {"most": MAX_TEMPLATE_KWARGS_LEN})
    return kwargs


TemplateKwargs = Annotated[dict[str, Any], AfterValidator(_sendable)]
ReasoningEffort = Annotated[Text, Field(min_length=1, max_length=32)]


class Thinking(Strict):
    """Anthropic's word on whether a model reasons before it answers, and for how many tokens at most."""

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: PositiveCount | None = None
    display: Literal["summarized"] | None = None
    """The reasoning is in the answer; Messages can leave it out."""

    @model_validator(mode="after")
    def _bounds_what_there_is(self) -> Self:
        if self.type == "disabled" and self.budget_tokens is not None:
            raise conflict("budget_tokens", "not with type 'disabled', where there is nothing to bound")
        return self


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]


class TemplateFields(Strict):
    """What a request says of how the chat template renders its messages."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    reasoning_effort: ReasoningEffort | None = None
    thinking: Thinking | None = None

    @model_validator(mode="after")
    def _continues_or_begins(self) -> Self:
        if self.continue_final_message and self.add_generation_prompt:
            raise conflict(
                "add_generation_prompt",
                "the answer can't both go on with the last message and begin a new one",
            )
        return self

    @property
    def template(self) -> TemplateOptions:
        kwargs: dict[str, Any] = {}
        if self.reasoning_effort is not None:
            kwargs["reasoning_effort"] = self.reasoning_effort
            if self.reasoning_effort == "none":
                kwargs["enable_thinking"] = False
        if self.thinking is not None:
            kwargs["enable_thinking"] = self.thinking.type != "disabled"
        kwargs |= self.chat_template_kwargs or {}
        continues = bool(self.continue_final_message)
        return TemplateOptions(
            add_generation_prompt=not continues and self.add_generation_prompt is not False,
            continue_final_message=continues,
            kwargs=json.dumps(kwargs) if kwargs else "",
        )
