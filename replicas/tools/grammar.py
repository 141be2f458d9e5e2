"""The grammar of a whole answer with calls or reasoning in it, in llguidance's Lark.

An answer is reasoning, where the model's marks begin it, and then text, calls or both. The text ends where
a call's opening does: from there on all is forced. No text begins as reasoning or a bare call does, so that
the lexer, which prefers the longest match, never takes these for text.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from replicas.answer_forms import GrammarFormat, JsonFormat, Tool
from replicas.json_schema import WHITESPACE, SchemaRefused, enforceable
from replicas.text_grammar import lark_text
from replicas.tools.families import FORMATS
from replicas.tools.formats import CallSchema, ToolFormat, literal
from replicas.tools.reasoning import ReasoningMarks

CALL_WHITESPACE = " "
"""What may stand between the tokens of a call's JSON: at most one blank, as models write it."""
_ANY = "/(?s:.*)/"


@dataclass(frozen=True, slots=True)
class AnswerGrammar:
    """The order for an answer by a grammar; what a compiler keeps compiled ones by."""

    format: str = ""
    """The name of the calls' format; empty where there are none."""
    tools: tuple[Tool, ...] = ()
    """The functions that may be called; their descriptions say nothing here."""
    places: tuple[int, ...] = ()
    """For each its index in the request."""
    is_required: bool = False
    is_parallel: bool = True
    answer: JsonFormat | GrammarFormat | None = None
    """The form of what is no call; None for text."""
    reasoning: ReasoningMarks | None = None
    begins_in_reasoning: bool = False
    """True if the prompt has the mark of reasoning's beginning at its end."""
    control_ids: tuple[tuple[str, int], ...] = ()
    """Tags and marks that are control tokens; others are text."""

    @property
    def is_strict(self) -> bool:
        return any(tool.strict for tool in self.tools) or (
            isinstance(self.answer, JsonFormat) and not self.answer.best_effort
        )

    def with_strict(self, is_strict: bool) -> "AnswerGrammar":
        """The same order, in which what can't be enforced of any schema is an error, or of none."""
        changed = replace(self, tools=tuple(replace(tool, strict=is_strict) for tool in self.tools))
        if isinstance(self.answer, JsonFormat):
            changed = replace(changed, answer=replace(self.answer, best_effort=not is_strict))
        return changed

    def apart(self) -> tuple["AnswerGrammar", ...]:
        """The orders for one tool each and for the answer, to find the one at fault; none where it is one."""
        pairs = zip(self.tools, self.places, strict=True)
        orders = [replace(self, tools=(tool,), places=(place,), answer=None) for tool, place in pairs]
        if self.answer is not None:
            orders.append(replace(self, tools=(), places=(), answer=self.answer))
        return tuple(orders) if len(orders) > 1 else ()

    @property
    def param(self) -> str:
        """The field of which a fault is told, where this is an order for one tool or for none."""
        if len(self.tools) == 1:
            return _param_of(self.places[0])
        return "tools" if self.tools or self.answer is None else self.answer.param

    def tool_at(self, param: str | None) -> str | None:
        """The name of the tool whose schema is in this field of the request; None where none's is."""
        pairs = zip(self.tools, self.places, strict=True)
        return next((tool.name for tool, place in pairs if _param_of(place) == param), None)

    def lark(self) -> str:
        """The grammar's text. SchemaRefused for a schema that can't be enforced."""
        calls = [self._call(tool, place) for tool, place in zip(self.tools, self.places, strict=True)]
        rules = ["%llguidance {}"]
        rules += self._reasoning() if self.reasoning is not None else ["start: body"]
        rules += self._body(FORMATS[self.format], calls) if calls else ["body: answer"]
        if self.answer is not None:
            rules.append(f"answer: {_nested(self.answer)}")
        return "\n".join(rules)

    def _tag(self, text: str) -> str:
        token_id = dict(self.control_ids).get(text)
        return literal(text) if token_id is None else f"<[{token_id}]>"

    def _is_control(self, text: str) -> bool:
        return text in dict(self.control_ids)

    def _call(self, tool: Tool, place: int) -> CallSchema:
        try:
            checked = enforceable(_of_object(tool.parameters), not tool.strict)
        except SchemaRefused as refused:
            raise SchemaRefused(str(refused), _param_of(place)) from None
        return CallSchema(tool.name, checked.embedded(CALL_WHITESPACE, not tool.strict))

    def _reasoning(self) -> list[str]:
        assert self.reasoning is not None
        begin, end = self._tag(self.reasoning.begin), self._tag(self.reasoning.end)
        is_control = self._is_control(self.reasoning.end)
        thought = f"thought: THOUGHT {end}" if is_control else f"thought[lazy]: THOUGHT {end}"
        first = "thought GAP?" if self.begins_in_reasoning else f"({begin} thought GAP?)?"
        return [f"start: {first} body", thought, f"THOUGHT: {_ANY}", r"GAP: /\n{1,2}/"]

    def _body(self, format_: ToolFormat, calls: Sequence[CallSchema]) -> list[str]:
        rules = format_.rules(calls, self.is_parallel, self._tag)
        opening = format_.opening
        tag = "" if opening is None else self._tag(opening)
        if self.is_required:
            return [f"body: {tag} calls", *rules]
        if self.answer is not None:
            return [f"body: answer | {tag} calls", *rules]
        rules.append(self._text(format_))
        if opening is None:
            return ["body: TEXT | calls", *rules]
        lazy = "" if self._is_control(opening) else "[lazy]"
        return ["body: TEXT | opened calls", f"opened{lazy}: TEXT {tag}", *rules]

    def _text(self, format_: ToolFormat) -> str:
        refused = []
        if self.reasoning is not None and not self._is_control(self.reasoning.begin):
            refused.append(_escaped(self.reasoning.begin))
        if format_.opening is None:
            refused.append(format_.not_text([tool.name for tool in self.tools]))
        return f"TEXT: {_ANY}" + (f" & ~/({'|'.join(refused)})(?s:.*)/" if refused else "")


def _param_of(place: int) -> str:
    return f"tools[{place}].function.parameters"


def _of_object(parameters: str) -> str:
    """The schema of arguments, which are an object whether it says so or not, and none where it has none."""
    schema = {**json.loads(parameters), "type": "object"}
    if schema.get("properties") == {}:
        schema.setdefault("additionalProperties", False)
    return json.dumps(schema)


def _nested(answer: JsonFormat | GrammarFormat) -> str:
    """The form of an answer as a part of a grammar. SchemaRefused where it can't be enforced."""
    if isinstance(answer, GrammarFormat):
        return f"%lark {{\n{lark_text(answer)}\n}}"
    try:
        checked = enforceable(answer.schema, answer.best_effort)
    except SchemaRefused as refused:
        raise SchemaRefused(str(refused), answer.param) from None
    whitespace = WHITESPACE if answer.whitespace is None else answer.whitespace
    return f"%json {checked.embedded(whitespace, answer.best_effort)}"


def _escaped(text: str) -> str:
    """The text as a pattern between slashes."""
    return "".join(f"\\{char}" if char in r"\/[](){}|.*+?^$" else char for char in text)
