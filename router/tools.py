"""The fields of a chat request that have to do with tools, and their checks."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, ValidationError
from pydantic_core import PydanticCustomError

from replicas.answer_forms import Tool, ToolUse
from router.config import MAX_JSON_DEPTH
from router.fields import Hint, Strict, Text, at_most, conflict, json_len, nested, read_json
from router.formats import sendable

MAX_TOOLS = 128
MAX_TOOLS_LEN = 256 * 1024
"""Of all tools together, in bytes of JSON."""
MAX_CALLS = 128
"""Of one message of the history."""

Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,128}$")]
"""As long as Anthropic's may be; OpenAI's have 64 characters at most."""
CallId = Annotated[Text, Field(min_length=1, max_length=256)]
_CHOICE_FORM = (
    'One of \'none\', \'auto\', \'required\', {"type": "function", "function": {"name": ...}}, or '
    '{"type": "allowed_tools", "allowed_tools": {"mode": ..., "tools": [...]}} is wanted'
)

_ARGUMENTS_FORM = f"it is to be the text of a JSON object, nested {MAX_JSON_DEPTH} deep at most"


def _parameters(schema: dict[str, Any]) -> dict[str, Any]:
    kind = sendable(schema).get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise PydanticCustomError("schema", "Arguments are an object; its type is to be 'object'")
    return schema


class FunctionTool(Strict):
    name: Name
    description: Text | None = None
    parameters: Annotated[dict[str, Any], AfterValidator(_parameters)] | None = None
    """None is a function without arguments."""
    strict: bool | None = None
    cache_control: Hint = None

    def tool(self) -> Tool:
        schema = self.parameters or {"type": "object", "properties": {}, "additionalProperties": False}
        return Tool(self.name, json.dumps(schema), self.description, self.strict is True)


class ToolField(Strict):
    type: Literal["function"]
    function: FunctionTool
    cache_control: Hint = None


def _short_enough(tools: list[ToolField]) -> list[ToolField]:
    length = sum(json_len(tool.model_dump(), "The list") for tool in tools)
    if length > MAX_TOOLS_LEN:
        raise PydanticCustomError("too_long", "All tools have at most {most} bytes", {"most": MAX_TOOLS_LEN})
    return tools


Tools = Annotated[list[ToolField], AfterValidator(_short_enough), at_most(MAX_TOOLS)]


class FunctionName(Strict):
    name: str


class NamedTool(Strict):
    """The order to call one function, or a member of a list of those allowed."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(Strict):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedToolsChoice(Strict):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


Choice = Literal["none", "auto", "required"] | NamedTool | AllowedToolsChoice


def _choice(value: Any) -> Choice:
    """The choice, whose fault is told by the field that has it, and not by every form it might have."""
    if isinstance(value, str) and value in ("none", "auto", "required"):
        return cast(Choice, value)
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in ("function", "allowed_tools"):
        raise PydanticCustomError("tool_choice", _CHOICE_FORM)
    try:
        if kind == "function":
            return NamedTool.model_validate(value)
        return AllowedToolsChoice.model_validate(value)
    except ValidationError as error:
        raise nested(error) from None


ToolChoice = Annotated[Choice, PlainValidator(_choice, json_schema_input_type=Choice)]


class FunctionCall(Strict):
    name: Name
    arguments: Text

    def for_template(self, field: str) -> dict[str, Any]:
        """The call as templates take it, with its arguments as an object."""
        try:
            arguments = read_json(self.arguments or "{}")
        except ValueError:
            arguments = None
        if not isinstance(arguments, dict):
            raise conflict(f"{field}.arguments", _ARGUMENTS_FORM)
        return {"name": self.name, "arguments": arguments}


class ToolCall(Strict):
    id: CallId
    type: Literal["function"] | None = None
    function: FunctionCall
    index: int | None = None
    """As deltas have it, which some clients keep."""


ToolCalls = Annotated[
    Annotated[list[ToolCall], Field(max_length=MAX_CALLS)] | None,
    BeforeValidator(lambda value: None if value == [] else value),
]
"""An empty list is none."""


def calls_for_template(
    tool_calls: Sequence[ToolCall] | None, function_call: FunctionCall | None
) -> dict[str, Any]:
    """The member `tool_calls` of a message as templates take it; empty where it has no calls."""
    calls = [
        {
            "id": call.id,
            "type": "function",
            "function": call.function.for_template(f"tool_calls[{index}].function"),
        }
        for index, call in enumerate(tool_calls or ())
    ]
    if function_call is not None:
        function = function_call.for_template("function_call")
        calls.append({"id": function_call.name, "type": "function", "function": function})
    return {"tool_calls": calls} if calls else {}


def tool_use(
    tools: Sequence[ToolField] | None, choice: Choice | None, is_parallel: bool | None
) -> ToolUse | None:
    """The order for the replica; None where nothing is to be called.

    PydanticCustomError for what does not fit together.
    """
    if not tools:
        if choice not in (None, "none", "auto"):  # these ask for no call
            raise conflict("tool_choice", "only with tools; leave it out, or send the tools")
        return None
    _check_unlike(tools)
    if choice == "none":
        return None
    known = tuple(tool.function.tool() for tool in tools)
    names = frozenset(tool.name for tool in known)
    is_required = choice == "required"
    if isinstance(choice, NamedTool):
        _check_known(choice.function.name, names, "tool_choice.function.name")
        names, is_required = frozenset({choice.function.name}), True
    elif isinstance(choice, AllowedToolsChoice):
        allowed = choice.allowed_tools
        for index, tool in enumerate(allowed.tools):
            _check_known(tool.function.name, names, f"tool_choice.allowed_tools.tools[{index}].function.name")
        names = frozenset(tool.function.name for tool in allowed.tools)
        is_required = allowed.mode == "required"
    return ToolUse(known, names, is_required, is_parallel is not False)


def _check_unlike(tools: Sequence[ToolField]) -> None:
    seen: set[str] = set()
    for index, tool in enumerate(tools):
        name = tool.function.name
        if name in seen:
            raise conflict(f"tools[{index}].function.name", f"several tools are named '{name}'; rename one")
        seen.add(name)


def _check_known(name: str, names: frozenset[str], field: str) -> None:
    if name not in names:
        raise conflict(field, f"no tool is named '{name}'; the tools are: {', '.join(sorted(names))}")
