"""Patterns of a JSON schema: whether llguidance takes them, and what it would get wrong of them put right.

llguidance (1.9.1) has no look-around, word boundaries or back references, and takes quotes and backslashes
for a class that has all control characters.
"""

import json
import re
from functools import lru_cache

from llguidance import LLMatcher

_IN_PATTERN = re.compile(
    r"(?P<nul>\x00|\\0|\\x00|\\u0000)-(?!\])|\\[pP](?:\{[^}]*\}|[A-Za-z])|\\.|\[\^-?|\[|\]", re.DOTALL
)
"""Matches the parts of a pattern that tell its character classes: brackets, escapes, ranges from \\0 on."""
_CAUSE = re.compile(r".*error: (?P<cause>.*)$")


@lru_cache(maxsize=1024)
def problem_of(pattern: str) -> str | None:
    """Why llguidance does not take a pattern; None where it does."""
    schema = json.dumps({"type": "string", "pattern": pattern})
    found = " ".join(str(LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(schema))).split())
    if not found:
        return None
    cause = _CAUSE.search(found)
    return found if cause is None else cause["cause"]


def narrowed(pattern: str) -> str:
    """Takes one control character, \\x01, out of the classes that may have all of them."""
    depth = 0  # of classes

    def narrow(found: re.Match[str]) -> str:
        nonlocal depth
        text = found[0]
        if text.startswith("["):
            depth += 1
            return text.replace("-", r"\-").replace("^", r"^\x01")
        if text == "]":
            depth = max(0, depth - 1)
        elif text.startswith(r"\P"):
            return rf"[^\x01\p{text[2:]}]"
        elif depth and found["nul"]:
            return rf"{found['nul']}\x02-"
        return text

    return _IN_PATTERN.sub(narrow, pattern)
