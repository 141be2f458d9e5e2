"""Latency targets of a class of requests, written as `ttft=0.5,tpot=0.05` or `batch:e2e=20`."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Slo:
    """Latency targets of one request in seconds; None is no target."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    def __str__(self) -> str:
        named = (("TTFT", self.ttft_s), ("TPOT", self.tpot_s), ("E2E", self.e2e_s))
        return ", ".join(f"{name} {1000 * value:g} ms" for name, value in named if value is not None)


class SloError(ValueError):
    """A target that cannot be read; the message says how to write it."""


def parse_slos(texts: Sequence[str], classes: Iterable[str]) -> dict[str, Slo]:
    """Targets by class. `class:` in front names one of `classes`; without it the target holds for them all.

    Raises SloError.
    """
    known = list(classes)
    found: dict[str, Slo] = {}
    for text in texts:
        name, colon, targets = text.rpartition(":")
        if colon and name not in known:
            raise SloError(f"'{text}': no class '{name}'; the classes are: {', '.join(known)}")
        slo = Slo(**dict(_target(part, text) for part in targets.split(",")))
        found |= dict.fromkeys([name] if colon else known, slo)
    return found


def _target(part: str, text: str) -> tuple[str, float]:
    key, _, value = part.strip().partition("=")
    try:
        seconds = float(value)
        if key not in ("ttft", "tpot", "e2e") or not (math.isfinite(seconds) and seconds > 0):
            raise ValueError
    except ValueError:
        raise SloError(f"'{text}': write seconds of ttft, tpot or e2e, as in ttft=0.5,tpot=0.05") from None
    return f"{key}_s", seconds
