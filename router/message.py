"""The messages of a chat, as clients send them and as chat templates take them."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from router.fields import NoList, Strict, Text, Unsupported, conflict
from router.tools import FunctionCall, ToolCalls, calls_for_template

MAX_NAME_LEN = 256


def _text(value: Any) -> Any:
    """The content, whose text parts are concatenated where it is a list."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise PydanticCustomError("unsupported_value", "Only content parts of type 'text' are supported.")
        text = part.get("text")
        if len(part) != 2 or not isinstance(text, str):
            raise PydanticCustomError("text_part", "A text part has a 'type' and a string 'text'")
        texts.append(text)
    return "".join(texts)


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[Text | None, BeforeValidator(_text)] = None
    name: Annotated[Text, Field(max_length=MAX_NAME_LEN)] | None = None
    """Of the function whose result it is."""
    tool_call_id: Annotated[Text, Field(max_length=MAX_NAME_LEN)] | None = None
    tool_calls: ToolCalls = None
    function_call: FunctionCall | None = None
    # What an answer's message carries, so that it can be sent back as it came.
    refusal: Unsupported = None
    audio: Unsupported = None
    annotations: NoList = None

    @model_validator(mode="after")
    def _fits_its_role(self) -> Self:
        has_calls = self.tool_calls is not None or self.function_call is not None
        if self.content is None and not has_calls:
            raise conflict("content", "it is to be a text")
        if has_calls and self.role != "assistant":
            field = "function_call" if self.tool_calls is None else "tool_calls"
            raise conflict(field, "only messages of the assistant have calls")
        if self.role == "tool" and self.tool_call_id is None:
            raise conflict("tool_call_id", "a tool's result names the call that it answers")
        if self.role == "function" and self.name is None:
            raise conflict("name", "a function's result names the function")
        if self.role not in ("tool", "function") and self.name is not None:
            raise conflict("name", "only results of tools have a name here; leave it out")
        calls_for_template(self.tool_calls, self.function_call)
        return self

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates take it. OpenAI renamed `system` to `developer`, and `function` to
        `tool`; templates know the one's old name and the other's new one."""
        role = {"developer": "system", "function": "tool"}.get(self.role, self.role)
        found = {"role": role, "content": self.content or ""}
        if self.name is not None:
            found["name"] = self.name
        if role == "tool":
            found["tool_call_id"] = self.tool_call_id or self.name or ""
        return found | calls_for_template(self.tool_calls, self.function_call)

    @property
    def num_chars(self) -> int:
        calls = sum(len(call.function.name + call.function.arguments) for call in self.tool_calls or ())
        return len(self.content or "") + calls
