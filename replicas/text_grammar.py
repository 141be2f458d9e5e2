"""Forms of an answer other than one JSON schema, as grammars in llguidance's notations."""

import json
import re

from llguidance import LLMatcher, StructTag

from replicas.answer_forms import GrammarFormat, GrammarKind
from replicas.json_schema import SchemaRefused, enforceable

_TEXT = "start: TEXT\nTEXT: "


def grammar_text(asked: GrammarFormat) -> str:
    """The grammar of an order, for an LLMatcher. SchemaRefused where it can't be one."""
    match asked.kind:
        case GrammarKind.REGEX:
            return str(LLMatcher.grammar_from_regex(asked.text))
        case GrammarKind.CHOICE:
            return _lark("start: " + " | ".join(map(json.dumps, json.loads(asked.text))))
        case GrammarKind.STRUCTURAL_TAG:
            return _lark(_tagged(json.loads(asked.text)))
        case GrammarKind.WITHOUT_WORDS:
            words = "|".join(map(_literal, json.loads(asked.text)))
            return _lark(f"{_TEXT}/(?s:.*)/ & ~/(?s:.*)({words})(?s:.*)/")
        case GrammarKind.LARK:
            return _lark(asked.text)


def lark_text(asked: GrammarFormat) -> str:
    """The grammar of an order in Lark, for a grammar that has it as a part. SchemaRefused as above."""
    grammar = grammar_text(asked)
    if asked.kind is GrammarKind.REGEX:
        grammar = json.loads(grammar)["grammars"][0]["lark_grammar"]
    return grammar


def _literal(word: str) -> str:
    """A pattern of the word alone, as it stands between slashes, where no line ends."""
    return re.escape(word).replace("\\\n", "\\n").replace("/", "\\/")


def _lark(text: str) -> str:
    return str(LLMatcher.grammar_from_lark(text))


def _tagged(tag: dict[str, list[dict[str, str]]]) -> str:
    """Free text, in which each trigger begins one of the structures that begin with it."""
    tags = []
    for structure in tag["structures"]:
        schema = enforceable(json.dumps(structure["schema"]), best_effort=True).schema
        begin, end = structure["begin"], structure.get("end") or ""
        found = [trigger for trigger in tag["triggers"] if begin.startswith(str(trigger))]
        if not found:
            raise SchemaRefused(f"no trigger is a beginning of the structure {begin!r}")
        tags.append(StructTag(trigger=str(found[0]), begin=begin, grammar=schema, end=end))
    return str(StructTag.to_grammar(tags, assume_special=False))
