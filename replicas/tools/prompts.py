"""What a chat template is given of tools, and what one that knows none is given in their place."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import meta

from replicas.answer_forms import Tool, ToolUse
from replicas.messages import Message

_INSTRUCTIONS = (
    "You can call functions. They are described here, one a line, with JSON schemas of their arguments:\n"
    "{functions}\n"
    "To call one, write its name and arguments in this form:\n"
    "<tool_call>\n"
    '{{"name": "<the function\'s name>", "arguments": {{<its arguments>}}}}\n'
    "</tool_call>"
)


def knows_tools(template: str | None) -> bool:
    """True if a chat template takes tools. One that can't be parsed fails where it is rendered."""
    if template is None:
        return False
    try:
        parsed = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
        return "tools" in meta.find_undeclared_variables(parsed)
    except jinja2.TemplateError:
        return "tools" in template


def for_template(tools: ToolUse | None) -> list[dict[str, Any]] | None:
    """The tools as templates take them, which is OpenAI's form; None where there are none."""
    return None if tools is None else [{"type": "function", "function": _function(t)} for t in tools.tools]


def wants_short_ids(template: str | None) -> bool:
    """True if a chat template takes no ids of calls but those of 9 characters, as Mistral's do."""
    return re.search(r"length\s*[!=]=\s*9", template or "") is not None


def with_short_ids(messages: Sequence[Message]) -> list[Message]:
    """The messages with ids of calls, and of what answers them, as 9 letters and digits."""
    found: list[Message] = []
    for message in messages:
        changed = dict(message)
        if "tool_call_id" in message:
            changed["tool_call_id"] = _short(message["tool_call_id"])
        if "tool_calls" in message:
            changed["tool_calls"] = [{**call, "id": _short(call["id"])} for call in message["tool_calls"]]
        found.append(changed)
    return found


def _short(call_id: str) -> str:
    if re.fullmatch(r"[a-zA-Z0-9]{9}", call_id):
        return call_id
    return hashlib.sha256(call_id.encode()).hexdigest()[:9]


def spelled_out(messages: Sequence[Message], tools: ToolUse | None) -> list[dict[str, Any]]:
    """Messages for a template that knows neither tools nor what has to do with them.

    The functions are described in the system message, calls are written in Hermes' form, and results come
    from the user in tags, in one message with what the user says before or behind them.
    """
    found: list[dict[str, Any]] = []
    for message in messages:
        role, content = message["role"], message["content"]
        is_result = role == "tool"
        if is_result:
            message, role, content = {}, "user", f"<tool_response>\n{content}\n</tool_response>"
        if role == "user" and found and found[-1]["role"] == "user" and (is_result or found[-1]["is_result"]):
            found[-1] |= {"content": f"{found[-1]['content']}\n{content}", "is_result": is_result}
            continue
        calls = map(_written, message.get("tool_calls", ()))
        text = "\n".join(filter(None, (content, *calls)))
        found.append({**message, "role": role, "content": text, "is_result": is_result})
    unknown = ("is_result", "tool_calls", "tool_call_id")
    plain = [{key: value for key, value in message.items() if key not in unknown} for message in found]
    return plain if tools is None else _instructed(plain, tools)


def _function(tool: Tool) -> dict[str, Any]:
    described = {} if tool.description is None else {"description": tool.description}
    return {"name": tool.name, **described, "parameters": json.loads(tool.parameters)}


def _written(call: Mapping[str, Any]) -> str:
    function = call["function"]
    text = json.dumps({"name": function["name"], "arguments": function["arguments"]}, ensure_ascii=False)
    return f"<tool_call>\n{text}\n</tool_call>"


def _instructed(messages: list[dict[str, Any]], tools: ToolUse) -> list[dict[str, Any]]:
    functions = "\n".join(json.dumps(_function(tool), ensure_ascii=False) for tool in tools.tools)
    text = _INSTRUCTIONS.format(functions=functions)
    if messages and messages[0]["role"] == "system":
        first = {"role": "system", "content": f"{messages[0]['content']}\n\n{text}"}
        return [first, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]
