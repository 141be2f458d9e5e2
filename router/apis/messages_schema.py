"""Anthropic's Messages: the bodies that a client may send, and the chat requests that they amount to."""

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from router.apis.translated import AllowedCallers, TranslatedRequest, text_as
from router.chat import MAX_MESSAGES, Thinking
from router.completion import Stops, Temperature, TopP
from router.fields import (
    INTEGRAL,
    MAX_INT32,
    Hint,
    NoList,
    Off,
    PositiveCount,
    Strict,
    Text,
    Unsupported,
    conflict,
    one_of,
)
from router.tools import MAX_TOOLS, CallId, Name


class TextBlock(Strict):
    type: Literal["text"]
    text: Text
    cache_control: Hint = None
    citations: NoList = None


TextBlocks = Annotated[
    list[Annotated[TextBlock, one_of({"text": TextBlock})]],
    text_as("text", list[TextBlock]),
]


class ThinkingBlock(Strict):
    type: Literal["thinking"]
    thinking: Text
    signature: Text | None = None


class RedactedThinkingBlock(Strict):
    type: Literal["redacted_thinking"]
    data: Hint = None


class ToolUseBlock(Strict):
    type: Literal["tool_use"]
    id: CallId
    name: Name
    input: dict[str, Any]
    cache_control: Hint = None
    caller: Hint = None


class ToolResultBlock(Strict):
    type: Literal["tool_result"]
    tool_use_id: CallId
    content: TextBlocks | None = None
    is_error: bool | None = None
    cache_control: Hint = None


Block = TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock
_KINDS = {
    "text": TextBlock,
    "thinking": ThinkingBlock,
    "redacted_thinking": RedactedThinkingBlock,
    "tool_use": ToolUseBlock,
    "tool_result": ToolResultBlock,
}
_TEXTS = ("content", "reasoning_content")


class MessageParam(Strict):
    role: Literal["user", "assistant", "system"]
    content: Annotated[list[Annotated[Block, one_of(_KINDS)]], text_as("text", list[Block])]

    @model_validator(mode="after")
    def _calls_by_its_role(self) -> Self:
        if self.role != "assistant" and any(isinstance(block, ToolUseBlock) for block in self.content):
            raise conflict("content", "only messages of the assistant have calls")
        return self

    def chat_messages(self) -> list[dict[str, Any]]:
        """The chat messages that it amounts to: each tool's result is one of its own."""
        found: list[dict[str, Any]] = []
        said: dict[str, Any] = {}
        for block in self.content:
            match block:
                case TextBlock():
                    said.setdefault("content", []).append(block.text)
                case ThinkingBlock():
                    said.setdefault("reasoning_content", []).append(block.thinking)
                case ToolUseBlock():
                    function = {"name": block.name, "arguments": json.dumps(block.input)}
                    said.setdefault("tool_calls", []).append({"id": block.id, "function": function})
                case ToolResultBlock():
                    if said:
                        found.append({"role": self.role} | _joined(said, ""))
                        said = {}
                    text = "".join(part.text for part in block.content or ())
                    content = f"Error: {text}" if block.is_error else text
                    found.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": content})
        if said or not found:
            found.append({"role": self.role} | _joined(said, ""))
        return found


def _joined(said: Mapping[str, list[Any]], separator: str) -> dict[str, Any]:
    """What one message says, its texts in lists joined; it has a content, if an empty one."""
    texts = {"content": ""} | {key: separator.join(said[key]) for key in _TEXTS if said.get(key)}
    return texts | {key: parts for key, parts in said.items() if key not in _TEXTS}


def _one_turn(messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Messages of one role that follow one another as the one that they are to a model.

    Their texts are paragraphs.
    """
    said: dict[str, list[Any]] = {}
    for message in messages:
        for key in _TEXTS:
            if message.get(key):
                said.setdefault(key, []).append(message[key])
        if "tool_calls" in message:
            said.setdefault("tool_calls", []).extend(message["tool_calls"])
    return {"role": messages[0]["role"]} | _joined(said, "\n\n")


class ToolParam(Strict):
    name: Text
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    description: Text | None = None
    strict: bool | None = None
    cache_control: Hint = None
    eager_input_streaming: Hint = None
    allowed_callers: AllowedCallers = None
    defer_loading: Off = None
    input_examples: NoList = None

    def for_chat(self) -> dict[str, Any]:
        function: dict[str, Any] = {"name": self.name, "parameters": self.input_schema}
        optional = {"description": self.description, "strict": self.strict}
        function |= {key: value for key, value in optional.items() if value is not None}
        return {"type": "function", "function": function}


class ToolChoiceParam(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: Text | None = None
    disable_parallel_tool_use: bool | None = None

    def for_chat(self) -> Any:
        match self.type:
            case "any":
                return "required"
            case "tool":
                return {"type": "function", "function": {"name": self.name or ""}}
        return self.type


class OutputFormat(Strict):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class ThinkingConfig(Thinking):
    """As in chats; `omitted` leaves the texts of the thinking out of the answer."""

    display: Literal["summarized", "omitted"] | None = None  # type: ignore[assignment]


class ClearedThinking(Strict):
    """The edit that clears nothing: all turns keep their thinking."""

    type: Literal["clear_thinking_20251015"]
    keep: Annotated[
        Literal["all"], BeforeValidator(lambda value: "all" if value == {"type": "all"} else value)
    ]


class ContextManagement(Strict):
    edits: list[Annotated[ClearedThinking, one_of({"clear_thinking_20251015": ClearedThinking})]] | None = (
        None
    )


class OutputConfig(Strict):
    effort: Text | None = None
    format: OutputFormat | None = None


_NAMES = (
    (r"^tools\[(\d+)\]\.function\.parameters", r"tools[\1].input_schema"),
    (r"^tools\[(\d+)\]\.function", r"tools[\1]"),
    (r"^tool_choice.*", "tool_choice"),
    (r"^parallel_tool_calls$", "tool_choice.disable_parallel_tool_use"),
    (r"^response_format\.json_schema", "output_config.format"),
    (r"^response_format", "output_config.format"),
    (r"^reasoning_effort$", "output_config.effort"),
    (r"^stop$", "stop_sequences"),
)
"""Names of a chat's fields, as patterns, with those of Anthropic's."""


class Conversation(TranslatedRequest):
    """What a body says that shows in its prompt."""

    prompt_field = "messages"
    names = _NAMES

    messages: Annotated[list[MessageParam], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: TextBlocks | None = None
    tools: Annotated[
        list[Annotated[ToolParam, one_of({"custom": ToolParam}, "custom")]] | None,
        Field(max_length=MAX_TOOLS),
    ] = None
    tool_choice: ToolChoiceParam | None = None
    thinking: ThinkingConfig | None = None
    context_management: ContextManagement | None = None
    output_config: OutputConfig | None = None
    cache_control: Hint = None
    speed: Literal["standard"] | None = None
    mcp_servers: NoList = None
    container: Unsupported = None

    def fields_of_chat(self) -> Mapping[str, Any]:
        messages = [message for message, _ in self._messages()]
        found: dict[str, Any] = {"messages": messages}
        last = messages[-1]
        if last["role"] == "assistant" and "tool_calls" not in last and last["content"].strip():
            found["continue_final_message"] = True
        if self.tools:
            found["tools"] = [tool.for_chat() for tool in self.tools]
        if self.tool_choice is not None:
            found["tool_choice"] = self.tool_choice.for_chat()
            found["parallel_tool_calls"] = not self.tool_choice.disable_parallel_tool_use
        output = self.output_config or OutputConfig()
        if output.effort is not None:
            found["reasoning_effort"] = output.effort
        if output.format is not None:
            schema = {"name": "output", "schema": output.format.schema_}
            found["response_format"] = {"type": "json_schema", "json_schema": schema}
        if self.thinking is not None:
            found["thinking"] = self.thinking
        return found

    @property
    def omits_thinking(self) -> bool:
        return self.thinking is not None and self.thinking.display == "omitted"

    def _messages(self) -> list[tuple[dict[str, Any], str]]:
        """The chat's messages, each with the name of what it is made of, or of the first that it is."""
        found: list[tuple[dict[str, Any], str]] = []
        if self.system is not None:
            text = "".join(block.text for block in self.system)
            found.append(({"role": "system", "content": text}, "system"))
        each = (
            (message, f"messages[{index}].content")
            for index, sent in enumerate(self.messages)
            for message in sent.chat_messages()
        )
        for role, group in groupby(each, key=lambda pair: pair[0]["role"]):
            pairs = list(group)
            if role in ("user", "assistant") and len(pairs) > 1:
                pairs = [(_one_turn([message for message, _ in pairs]), pairs[0][1])]
            found += pairs
        return found


class CountTokensRequest(Conversation):
    """A conversation whose tokens are to be counted."""


class MessagesRequest(Conversation):
    """A conversation to go on with."""

    max_tokens: PositiveCount
    stop_sequences: Stops | None = None
    stream: bool | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: Annotated[int, Field(ge=0, le=MAX_INT32), INTEGRAL] | None = None
    metadata: Hint = None
    service_tier: Hint = None
    inference_geo: Hint = None
    diagnostics: Hint = None

    def fields_of_chat(self) -> Mapping[str, Any]:
        same = ("max_tokens", "stream", "temperature", "top_p", "top_k")
        found = {name: value for name in same if (value := getattr(self, name)) is not None}
        if self.stop_sequences:
            found["stop"] = self.stop_sequences
        return {**super().fields_of_chat(), **found}
