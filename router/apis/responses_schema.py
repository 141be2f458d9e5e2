"""OpenAI's Responses: the body that a client may send, and the chat request that it amounts to."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from router.apis.translated import AllowedCallers, TranslatedRequest, text_as
from router.chat import MAX_MESSAGES, ReasoningEffort
from router.completion import Metadata, Temperature, TopP
from router.fields import (
    Hint,
    Neutral,
    NoList,
    Off,
    PositiveCount,
    Strict,
    Text,
    Unsupported,
    conflict,
    one_of,
    unicode,
)
from router.tools import MAX_TOOLS, CallId


class TextPart(Strict):
    type: Literal["input_text", "output_text", "text"]
    text: Text
    annotations: Hint = None
    logprobs: Hint = None
    prompt_cache_breakpoint: Hint = None


class RefusalPart(Strict):
    type: Literal["refusal"]
    refusal: Text

    @property
    def text(self) -> str:
        return self.refusal


_PARTS: dict[str, Any] = {
    "input_text": TextPart,
    "output_text": TextPart,
    "text": TextPart,
    "refusal": RefusalPart,
}


Parts = Annotated[
    list[Annotated[TextPart | RefusalPart, one_of(_PARTS)]],
    text_as("input_text", list[TextPart | RefusalPart]),
]


class Item(Strict):
    """An item of the input; an answer's can be sent back as they came."""

    id: Text | None = None
    status: Text | None = None


class MessageItem(Item):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Parts
    phase: Hint = None


Caller = Annotated[Any, Neutral({"type": "direct"})]
"""What made a call: the model, and no program of its, which nothing here runs."""


class CallItem(Item):
    type: Literal["function_call"]
    call_id: CallId
    name: Text
    arguments: Text
    caller: Caller = None
    is_async: Annotated[Off, Field(alias="async")] = None


class CallOutputItem(Item):
    type: Literal["function_call_output"]
    call_id: CallId
    output: Parts
    name: Text | None = None
    caller: Caller = None


class ReasoningText(Strict):
    type: Literal["reasoning_text", "summary_text"]
    text: Text


class ReasoningItem(Item):
    type: Literal["reasoning"]
    summary: list[ReasoningText] | None = None
    content: list[ReasoningText] | None = None
    encrypted_content: Hint = None


AnyItem = MessageItem | CallItem | CallOutputItem | ReasoningItem
_ITEMS: dict[str, Any] = {
    "message": MessageItem,
    "function_call": CallItem,
    "function_call_output": CallOutputItem,
    "reasoning": ReasoningItem,
}


def _items(value: Any) -> Any:
    return [{"role": "user", "content": unicode(value)}] if isinstance(value, str) else value


def _no_reference(value: Any) -> Any:
    if isinstance(value, dict) and value.get("type") == "item_reference":
        message = "Responses are not stored; send the item itself, as SDKs do with store: false."
        raise PydanticCustomError("unsupported_value", message)
    return value


class FunctionParam(Strict):
    type: Literal["function"]
    name: Text
    parameters: dict[str, Any] | None = None
    description: Text | None = None
    strict: bool | None = None
    output_schema: Hint = None
    allowed_callers: AllowedCallers = None
    defer_loading: Off = None
    is_async: Annotated[Off, Field(alias="async")] = None

    def for_chat(self) -> dict[str, Any]:
        same = {"name", "parameters", "description", "strict"}
        return {"type": "function", "function": self.model_dump(include=same, exclude_none=True)}


class NamedFunction(Strict):
    type: Literal["function"]
    name: Text

    def for_chat(self) -> dict[str, Any]:
        return {"type": "function", "function": {"name": self.name}}


class AllowedFunctions(Strict):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunction], Field(min_length=1, max_length=MAX_TOOLS)]

    def for_chat(self) -> dict[str, Any]:
        allowed = {"mode": self.mode, "tools": [tool.for_chat() for tool in self.tools]}
        return {"type": "allowed_tools", "allowed_tools": allowed}


_CHOICE: Any = one_of({"function": NamedFunction, "allowed_tools": AllowedFunctions})


def _choice(value: Any) -> Any:
    if isinstance(value, str):
        if value not in ("none", "auto", "required"):
            message = "One of 'none', 'auto', 'required' or an object is wanted"
            raise PydanticCustomError("tool_choice", message)
        return value
    return _CHOICE.func(value)


ToolChoice = Annotated[
    Literal["none", "auto", "required"] | NamedFunction | AllowedFunctions,
    PlainValidator(
        _choice,
        json_schema_input_type=Literal["none", "auto", "required"] | NamedFunction | AllowedFunctions,
    ),
]


class TextFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    name: Text | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    description: Text | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> Self:
        for name in ("name", "schema_") if self.type == "json_schema" else ():
            if getattr(self, name) is None:
                raise conflict(name.rstrip("_"), "goes with type 'json_schema'")
        if self.schema_ is not None and self.type != "json_schema":
            raise conflict("schema", "only with type 'json_schema'")
        return self

    def for_chat(self) -> dict[str, Any]:
        if self.type != "json_schema":
            return {"type": self.type}
        found = self.model_dump(exclude={"type"}, exclude_none=True, by_alias=True)
        return {"type": self.type, "json_schema": found}


class TextConfig(Strict):
    format: TextFormat | None = None
    verbosity: Hint = None


class Reasoning(Strict):
    effort: ReasoningEffort | None = None
    summary: Hint = None
    generate_summary: Hint = None
    context: Annotated[Any, Neutral("auto")] = None
    """The chat template says which turns' reasoning the model sees again."""
    mode: Annotated[Any, Neutral("standard")] = None


Included = Literal[
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "message.input_image.image_url",
]
"""What an answer may be asked to have besides. All but the first belong to items that none here has."""


class ResponseStreamOptions(Strict):
    include_obfuscation: Off = None


def _no_id(value: Any) -> Any:
    if value is not None:
        message = "Responses are not stored; send the whole conversation as input."
        raise PydanticCustomError("unsupported_value", message)
    return None


_NAMES = (
    (r"^tools\[(\d+)\]\.function", r"tools[\1]"),
    (r"^tool_choice\.function", "tool_choice"),
    (r"^tool_choice\.allowed_tools\.tools\[(\d+)\]\.function", r"tool_choice.tools[\1]"),
    (r"^response_format\.json_schema", "text.format"),
    (r"^response_format", "text.format"),
    (r"^reasoning_effort$", "reasoning.effort"),
    (r"^max_(completion_)?tokens$", "max_output_tokens"),
)
"""Names of a chat's fields, as patterns, with those of the Responses."""


class ResponsesRequest(TranslatedRequest):
    """A response to make."""

    prompt_field = "input"
    names = _NAMES

    input: Annotated[
        list[Annotated[AnyItem, one_of(_ITEMS, "message"), BeforeValidator(_no_reference)]],
        Field(min_length=1, max_length=MAX_MESSAGES),
        BeforeValidator(_items, json_schema_input_type=str | list[AnyItem]),
    ]
    instructions: Text | None = None
    max_output_tokens: PositiveCount | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    text: TextConfig | None = None
    tools: Annotated[
        list[Annotated[FunctionParam, one_of({"function": FunctionParam})]] | None,
        Field(max_length=MAX_TOOLS),
    ] = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    metadata: Metadata | None = None
    store: bool | None = None
    """Taken without effect: nothing is stored, and the answer says so."""
    previous_response_id: Annotated[Any, BeforeValidator(_no_id)] = None
    conversation: Annotated[Any, BeforeValidator(_no_id)] = None
    background: Off = None
    background_options: Annotated[Any, Neutral({"completion_window": "soonest"})] = None
    include: list[Included] | None = None
    """No reasoning is encrypted, as none is kept here: it is in the answer as it is."""
    top_logprobs: Annotated[Any, Neutral(0)] = None
    truncation: Literal["auto", "disabled"] | None = None
    prompt: Unsupported = None
    context_management: NoList = None
    moderation: Unsupported = None
    access_programs: Annotated[Any, Neutral({"cyber": "standard"})] = None
    image: Hint = None
    """Of images, of which an input has none."""
    max_tool_calls: Hint = None
    user: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: Hint = None

    def fields_of_chat(self) -> Mapping[str, Any]:
        found: dict[str, Any] = {"messages": [message for message, _ in self._messages()]}
        same = ("temperature", "top_p", "parallel_tool_calls", "stream", "truncation")
        found |= {name: value for name in same if (value := getattr(self, name)) is not None}
        if self.max_output_tokens is not None:
            found["max_completion_tokens"] = self.max_output_tokens
        if self.tools is not None:
            found["tools"] = [tool.for_chat() for tool in self.tools]
        if self.tool_choice is not None:
            choice = self.tool_choice
            found["tool_choice"] = choice if isinstance(choice, str) else choice.for_chat()
        if self.text is not None and self.text.format is not None:
            found["response_format"] = self.text.format.for_chat()
        if self.reasoning is not None and self.reasoning.effort is not None:
            found["reasoning_effort"] = self.reasoning.effort
        return found

    def _messages(self) -> list[tuple[dict[str, Any], str]]:
        """The chat's messages, each with the name of what it is made of.

        Reasoning, text and calls that follow one another are one message of the assistant.
        """
        found: list[tuple[dict[str, Any], str]] = []
        if self.instructions is not None:
            found.append(({"role": "system", "content": self.instructions}, "instructions"))
        turn: dict[str, Any] | None = None
        for index, item in enumerate(self.input):
            where = f"input[{index}]"
            match item:
                case MessageItem(role="assistant"):
                    if turn is None or "content" in turn or "tool_calls" in turn:
                        turn = {"role": "assistant"}
                        found.append((turn, where))
                    turn["content"] = _text(item.content)
                    continue
                case CallItem() | ReasoningItem():
                    if turn is None or (isinstance(item, ReasoningItem) and len(turn) > 1):
                        turn = {"role": "assistant"}
                        found.append((turn, where))
                    _add(turn, item)
                    continue
                case MessageItem():
                    found.append(({"role": item.role, "content": _text(item.content)}, where))
                case CallOutputItem():
                    result = {"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)}
                    if item.name is not None:
                        result["name"] = item.name
                    found.append((result, where))
            turn = None
        return found


def _text(parts: list[TextPart | RefusalPart]) -> str:
    return "".join(part.text for part in parts)


def _add(turn: dict[str, Any], item: CallItem | ReasoningItem) -> None:
    """Adds a call or reasoning to a message of the assistant."""
    if isinstance(item, CallItem):
        function = {"name": item.name, "arguments": item.arguments}
        turn.setdefault("tool_calls", []).append({"id": item.call_id, "function": function})
    elif text := "".join(part.text for part in item.content or item.summary or ()):
        turn["reasoning_content"] = text
