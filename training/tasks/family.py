"""Task families: each draws parameters, phrases the request, writes the answer and checks answers."""

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Params = dict[str, Any]
Message = dict[str, Any]
"""A chat message as chat templates take it: `role`, `content`, and an assistant's `tool_calls`."""

HELD_OUT_ONE_IN = 20
"""One in this many parameter combinations belongs to the held-out split."""


@dataclass(frozen=True)
class Chat:
    """Messages, and the functions offered in them, in OpenAI's form."""

    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)


def _request_alone(params: Params, request: str, rng: random.Random) -> Chat:
    return Chat([{"role": "user", "content": request}])


@dataclass(frozen=True)
class Family:
    """One kind of task."""

    name: str
    sample: Callable[[random.Random], Params]
    """Draws JSON-able parameters, which alone determine the answer."""
    phrase: Callable[[Params, random.Random], str]
    """Writes the request in one of several wordings."""
    answer: Callable[[Params], str]
    """Writes the reference answer."""
    check: Callable[[Params, str], bool]
    """Judges an answer by parsing or running it; one that differs from the reference only in layout may
    pass."""
    chat: Callable[[Params, str, random.Random], Chat] = _request_alone
    """Puts the request in a chat that ends where the answer begins."""
    asked: Callable[[Params], tuple[str, Any]] | None = None
    """What the split goes by: a kind of request and its JSON-able parameters. None: the family's name and all
    parameters."""

    def is_held_out(self, params: Params) -> bool:
        """True if what is asked belongs to the held-out split."""
        kind, asked = (self.name, params) if self.asked is None else self.asked(params)
        return is_held_out(kind, asked)


@dataclass(frozen=True)
class Task:
    """One request with its reference answer."""

    family: str
    params: Params
    prompt: str
    answer: str
    chat: Chat
    """All that comes before the answer, the prompt among it."""


def is_held_out(family: str, params: Any) -> bool:
    """True if the combination belongs to the held-out split: a stable hash of family and parameters.

    The wording is not hashed, so a held-out combination is never trained on in any wording.
    """
    canonical = json.dumps([family, params], sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(canonical.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def draw(family: Family, rng: random.Random, held_out: bool) -> Task:
    """Draws a task of the wanted split by rejection."""
    while True:
        params = family.sample(rng)
        if family.is_held_out(params) == held_out:
            prompt = family.phrase(params, rng)
            return Task(family.name, params, prompt, family.answer(params), family.chat(params, prompt, rng))
