"""Task families: each draws parameters, phrases the request, writes the answer and checks answers."""

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Params = dict[str, Any]

HELD_OUT_ONE_IN = 20
"""One in this many parameter combinations belongs to the held-out split."""


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


@dataclass(frozen=True)
class Task:
    """One request with its reference answer."""

    family: str
    params: Params
    prompt: str
    answer: str


def is_held_out(family: str, params: Params) -> bool:
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
        if is_held_out(family.name, params) == held_out:
            return Task(family.name, params, family.phrase(params, rng), family.answer(params))
