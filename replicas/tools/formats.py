"""The formats in which families of models call functions: a grammar and a reader for each.

A format says how a call is written behind its opening. The openings' tags may be control tokens of a
tokenizer, or text; `Tag` gives a tag's spelling in either case.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from replicas.tools.readers import CallReader, JsonCallReader

Tag = Callable[[str], str]
"""The spelling of a tag: in a grammar, or in the text that is read."""


@dataclass(frozen=True, slots=True)
class CallSchema:
    """A function that a grammar may call. arguments: the schema that llguidance enforces, as JSON text."""

    name: str
    arguments: str


class ToolFormat(ABC):
    name: str
    opening: str | None = None
    """The tag before a call; None where a call is known by its beginning, at the answer's very beginning."""
    tags: tuple[str, ...] = ()

    @abstractmethod
    def rules(self, calls: Sequence[CallSchema], is_parallel: bool, tag: Tag) -> list[str]:
        """Lark rules of which `calls` is all that comes behind the first opening."""

    @abstractmethod
    def reader(self, tag: Tag) -> CallReader:
        """A reader of what comes behind an opening."""

    def not_text(self, names: Collection[str]) -> str:
        """A pattern of beginnings that no plain answer has, where there is no opening."""
        raise NotImplementedError

    def begins_call(self, text: str, names: Collection[str], tag: Tag) -> bool | None:
        """Where there is no opening: whether an answer that begins so is a call; None is not to be told
        yet."""
        raise NotImplementedError


def literal(text: str) -> str:
    """A Lark string."""
    return json.dumps(text, ensure_ascii=False)


def arguments_rules(calls: Sequence[CallSchema]) -> list[str]:
    return [f"arguments_{k}: %json {call.arguments}" for k, call in enumerate(calls)]


def head_rules(calls: Sequence[CallSchema]) -> list[str]:
    """A rule for each call that is a JSON object, `arguments` its last member and the object left open."""
    heads = (literal(_head(call.name, "arguments")) for call in calls)
    return [f"call_{k}: {head} arguments_{k}" for k, head in enumerate(heads)]


def any_call(count: int) -> str:
    return " | ".join(f"call_{k}" for k in range(count))


def several(is_parallel: bool, rule: str) -> str:
    return f" ({rule})*" if is_parallel else ""


class Hermes(ToolFormat):
    """`<tool_call>` JSON `</tool_call>`, of NousResearch's Hermes and of Qwen; also for models whose template
    knows no tools."""

    name = "hermes"
    opening = "<tool_call>"
    tags = ("<tool_call>", "</tool_call>")
    _header = re.compile(r'\s*\{\s*"name"\s*:\s*"(?P<name>[^"\\]*)"\s*,\s*"arguments"\s*:\s*(?=\{)')

    def rules(self, calls: Sequence[CallSchema], is_parallel: bool, tag: Tag) -> list[str]:
        more = several(is_parallel, f'"\\n" {tag(self.opening)} call')
        return [
            f"calls: call{more}",
            f'call: "\\n" ({any_call(len(calls))}) "}}\\n" {tag("</tool_call>")}',
            *head_rules(calls),
            *arguments_rules(calls),
        ]

    def reader(self, tag: Tag) -> CallReader:
        return JsonCallReader(self._header, re.compile(r"\s*\}\s*" + re.escape(tag("</tool_call>"))))


class Mistral(ToolFormat):
    """`[TOOL_CALLS]name[ARGS]` JSON, of Mistral's newer models, Ministral among them."""

    name = "mistral"
    opening = "[TOOL_CALLS]"
    tags = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")

    def rules(self, calls: Sequence[CallSchema], is_parallel: bool, tag: Tag) -> list[str]:
        more = several(is_parallel, f"{tag(self.opening)} call")
        return [
            f"calls: call{more}",
            f"call: {any_call(len(calls))}",
            *(
                f"call_{k}: {literal(call.name)} call_id? {tag('[ARGS]')} arguments_{k}"
                for k, call in enumerate(calls)
            ),
            f"call_id: {tag('[CALL_ID]')} /[a-zA-Z0-9]{{9}}/",
            *arguments_rules(calls),
        ]

    def reader(self, tag: Tag) -> CallReader:
        call_id, arguments = re.escape(tag("[CALL_ID]")), re.escape(tag("[ARGS]"))
        header = rf"\s*(?P<name>[a-zA-Z0-9_.-]+)(?:{call_id}[a-zA-Z0-9]+)?{arguments}\s*(?=\{{)"
        return JsonCallReader(re.compile(header), re.compile(""))


class MistralList(ToolFormat):
    """`[TOOL_CALLS]` and a JSON list of calls, of Mistral's older models."""

    name = "mistral_list"
    opening = "[TOOL_CALLS]"
    tags = ("[TOOL_CALLS]",)
    _header = re.compile(r'\s*\[?\s*\{\s*"name"\s*:\s*"(?P<name>[^"\\]*)"\s*,\s*"arguments"\s*:\s*(?=\{)')

    def rules(self, calls: Sequence[CallSchema], is_parallel: bool, tag: Tag) -> list[str]:
        more = several(is_parallel, '", " call')
        return [
            f'calls: " "? "[" call{more} "]"',
            f'call: ({any_call(len(calls))}) "}}"',
            *head_rules(calls),
            *arguments_rules(calls),
        ]

    def reader(self, tag: Tag) -> CallReader:
        return JsonCallReader(self._header, re.compile(r"\s*\}"), separator=",", end="]")


class Llama3Json(ToolFormat):
    """A JSON object with `name` and `parameters`, of Llama 3.1 and 3.2, behind `<|python_tag|>` or bare."""

    name = "llama3_json"
    tags = ("<|python_tag|>",)
    _begin = r'\s*\{\s*("type"\s*:\s*"function"\s*,\s*)?"name"\s*:'
    _header = re.compile(_begin + r'\s*"(?P<name>[^"\\]*)"\s*,\s*"parameters"\s*:\s*(?=\{)')
    _beginnings = ('{"name":', '{"type":"function","name":')

    def rules(self, calls: Sequence[CallSchema], is_parallel: bool, tag: Tag) -> list[str]:
        more = several(is_parallel, '"; " call')
        before = tag("<|python_tag|>")
        if before.startswith('"'):  # no control token of this model, so as good as any text
            before = '""'
        return [
            f"calls: {before}? call{more}",
            f'call: ({any_call(len(calls))}) "}}"',
            *(f"call_{k}: HEAD_{k} arguments_{k}" for k in range(len(calls))),
            *(
                rf'HEAD_{k}: /[ \n]{{0,2}}\{{[ \n]?("type": ?"function", ?)?"name": ?"{call.name}", ?'
                rf'"parameters": ?/'
                for k, call in enumerate(calls)
            ),
            *arguments_rules(calls),
        ]

    def reader(self, tag: Tag) -> CallReader:
        before = re.compile(f"(?:{re.escape(tag('<|python_tag|>'))})?{self._header.pattern}")
        return JsonCallReader(before, re.compile(r"\s*\}"), separator=";")

    def not_text(self, names: Collection[str]) -> str:
        return self._begin

    def begins_call(self, text: str, names: Collection[str], tag: Tag) -> bool | None:
        if text.startswith(tag("<|python_tag|>")):
            return True
        return begins_with(re.sub(r"\s*([{:,])\s*", r"\1", text.strip()), self._beginnings)


def begins_with(text: str, beginnings: Collection[str]) -> bool | None:
    """Whether the text begins with one of these; None where it may yet come to."""
    if any(text.startswith(each) for each in beginnings):
        return True
    return None if any(each.startswith(text) for each in beginnings) else False


def _head(name: str, arguments: str) -> str:
    return f'{{"name": "{name}", "{arguments}": '
