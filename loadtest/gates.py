"""Bounds on a summary's figures that a release must keep: `ttft_p95<=0.5,errors<=0.01,attained>=0.95`."""

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

from loadtest.metrics import PERCENTILES, Distribution, Summary

_TIMES = ("ttft", "ttst", "tpot", "inter_chunk", "e2e")
_FIGURES: dict[str, Callable[[Summary], float | None]] = {
    "errors": lambda s: s.error_share,
    "attained": lambda s: s.attained,
    "goodput": lambda s: s.goodput,
    "correct": lambda s: s.correct,
    "tokens_per_s": lambda s: s.tokens_per_s,
    "requests_per_s": lambda s: s.requests_per_s,
    "tokens_per_forward": lambda s: s.tokens_per_forward,
}
_FORM = re.compile(r"([a-z0-9_]+)\s*(<=|>=)\s*([0-9.eE+-]+)$")


class GateError(ValueError):
    """A gate that cannot be read; the message says how to write it."""


@dataclass(frozen=True)
class Gate:
    """A bound on one figure of a summary."""

    figure: str
    sign: str
    bound: float

    def broken_by(self, summary: Summary) -> str | None:
        """The complaint; None if the gate holds. A missing figure breaks it: it was not shown to hold."""
        value = _value(summary, self.figure)
        holds = operator.le if self.sign == "<=" else operator.ge
        if value is not None and holds(value, self.bound):
            return None
        found = "not measured" if value is None else f"{value:.4g}"
        return f"{self.figure} is {found}, wanted {self.sign} {self.bound:g}"


def _value(summary: Summary, figure: str) -> float | None:
    if figure in _FIGURES:
        return _FIGURES[figure](summary)
    name, _, percentile = figure.rpartition("_p")
    distribution: Distribution = getattr(summary, name)
    return distribution.p(int(percentile))


def parse_gates(text: str) -> tuple[Gate, ...]:
    """Parses comma-separated gates; times in seconds, shares from 0 to 1. Raises GateError."""
    known = [*_FIGURES, *(f"{name}_p{p}" for name in _TIMES for p in PERCENTILES)]
    gates = []
    for part in filter(None, (item.strip() for item in text.split(","))):
        match = _FORM.match(part)
        try:
            if match is None or match[1] not in known:
                raise ValueError
            gates.append(Gate(match[1], match[2], float(match[3])))
        except ValueError:
            raise GateError(f"'{part}': write figure<=number or >=, of: {', '.join(known)}") from None
    return tuple(gates)
