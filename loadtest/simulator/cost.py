"""The cost of a forward in the simulator: a table of measured latencies, interpolated.

The table is JSON: `rows` of {sequences, query_tokens, cached_tokens, ms}, tokens summed over the forward's
sequences. `logits_ms`, optional, is the cost of each position past a sequence's first whose logits are
wanted, for rows measured with one a sequence. `overhead_ms` {step, sequence, query_token}, optional, is the
engine's time outside the forward: a step, a sequence in it and a query token of it.
`python -m benchmarks.step_cost` measures a table; loadtest/data/ has those of a B200, from public figures.
"""

import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy

from policies.cost import ForwardStats, StepCost
from policies.cost_fit import fit_step_cost, knots_up_to


class TableError(ValueError):
    """The table can't be used; the message says which part is missing or wrong."""


@dataclass(frozen=True, slots=True)
class _Curve:
    """Latency by query tokens a sequence, at one number of sequences."""

    queries: tuple[float, ...]
    """Query tokens a sequence, rising."""
    ms: tuple[float, ...]
    """Latency at each of them, with `cached` cached tokens a sequence."""
    by_cached: tuple[float, ...]
    """ms for each further cached token a sequence."""
    cached: float


class StepTable:
    """The latency of a forward.

    It is interpolated by straight lines between measured points: in sequences, in query tokens a sequence and
    in cached tokens a sequence. Past the largest block each further token costs what it did in the largest
    forwards measured. Where the smallest block is above 1 the line through it and the next is drawn on to 1,
    with the median of the slopes at about as many sequences, since a slope is mostly noise.
    """

    def __init__(
        self,
        rows: Sequence[dict[str, float]],
        overhead_ms: dict[str, float] | None = None,
        logits_ms: float = 0.0,
    ):
        levels = _levels(rows)
        overhead = overhead_ms or {}
        self._step_ms = overhead.get("step", 0.0)
        self._sequence_ms = overhead.get("sequence", 0.0)
        self._token_ms = overhead.get("query_token", 0.0)
        self._logits_ms = logits_ms
        self.max_sequences = max(levels)
        self.tail_ms = _tail_slope(levels)
        self._curves = _with_single_tokens(_filled_in(levels))
        self.rows = tuple(rows)

    def ms(self, sequences: float, query_tokens: float, cached_tokens: float, wanted: float = 0.0) -> float:
        """The latency of a forward of so many sequences and tokens in all, its overhead included.

        wanted: positions whose logits are wanted, in all; one a sequence at least
        """
        count = round(sequences)
        count = 1 if count < 1 else count if count <= self.max_sequences else self.max_sequences
        curve = self._curves[count]
        query = query_tokens / count
        queries, ms = curve.queries, curve.ms
        right = bisect_right(queries, query)
        if right == 0:
            right = 1
        past = query - queries[-1]
        if past > 0:
            base, by_cached = ms[-1] + self.tail_ms * past * count, curve.by_cached[-1]
        elif len(queries) == 1:
            base, by_cached = ms[0], curve.by_cached[0]
        else:
            right = min(right, len(queries) - 1)
            part = (query - queries[right - 1]) / (queries[right] - queries[right - 1])
            base = ms[right - 1] + part * (ms[right] - ms[right - 1])
            by_cached = curve.by_cached[right - 1]
            by_cached += max(0.0, part) * (curve.by_cached[right] - by_cached)
        base += by_cached * (cached_tokens / count - curve.cached)
        outside = self._step_ms + self._sequence_ms * sequences + self._token_ms * query_tokens
        if wanted > sequences:
            outside += self._logits_ms * (wanted - sequences)
        return max(base, 0.2 * ms[0]) + outside

    @classmethod
    def load(cls, path: Path) -> "StepTable":
        """Reads a table. Raises TableError, OSError."""
        return cls.parse(json.loads(path.read_text()), str(path))

    @classmethod
    def parse(cls, table: Any, name: str) -> "StepTable":
        try:
            rows = [
                {key: float(row[key]) for key in ("sequences", "query_tokens", "cached_tokens", "ms")}
                for row in table["rows"]
            ]
            overhead = {key: float(value) for key, value in table.get("overhead_ms", {}).items()}
            logits_ms = float(table.get("logits_ms", 0.0))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise TableError(
                f"{name}: not a table of step costs ({error!r}); it wants rows of sequences, query_tokens, "
                f"cached_tokens and ms, as `python -m benchmarks.step_cost` writes them"
            ) from error
        if not rows or any(row["ms"] <= 0 or row["sequences"] < 1 for row in rows):
            raise TableError(f"{name}: it wants at least one row, every ms above 0 and sequences from 1 up")
        return cls(rows, overhead, logits_ms)

    @cached_property
    def fitted(self) -> StepCost:
        """The step cost that a replica would have learned from these latencies at its start."""
        forwards = [
            ForwardStats(
                num_tokens=round(row["query_tokens"]),
                num_segments=round(row["sequences"]),
                num_cached=round(row["cached_tokens"]),
                ms=self.ms(row["sequences"], row["query_tokens"], row["cached_tokens"]),
            )
            for row in self.rows
        ]
        return fit_step_cost(forwards, knots_up_to(max(forward.num_tokens for forward in forwards)))


Levels = dict[int, dict[float, dict[float, float]]]
"""sequences -> cached tokens a sequence -> query tokens a sequence -> ms"""


def _levels(rows: Sequence[dict[str, float]]) -> Levels:
    levels: Levels = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        count = round(row["sequences"])
        levels[count][row["cached_tokens"] / count][row["query_tokens"] / count] = row["ms"]
    for by_cached in levels.values():
        # A prefill has nothing cached and is longer than any block: it goes on every curve.
        prefill = by_cached.pop(0.0, None) if len(by_cached) > 1 else None
        for curve in by_cached.values():
            curve.update({q: ms for q, ms in (prefill or {}).items() if q > max(curve)})
    return levels


def _tail_slope(levels: Levels) -> float:
    """ms a query token in the largest forwards."""
    ends = []
    for count, by_cached in levels.items():
        for curve in by_cached.values():
            if len(curve) > 1:
                (q0, ms0), (q1, ms1) = sorted(curve.items())[-2:]
                ends.append((count * q1, (ms1 - ms0) / (count * (q1 - q0))))
    if not ends:
        return 0.0
    largest = max(tokens for tokens, _ in ends)
    slopes = [slope for tokens, slope in ends if tokens >= largest / 2]
    return max(0.0, float(numpy.median(slopes)))


def _filled_in(levels: Levels) -> list[_Curve]:
    """A curve for every number of sequences from 0 (unused) up to the largest measured."""
    counts = sorted(levels)
    measured = {count: _curve(levels[count]) for count in counts}
    curves = [measured[counts[0]]]
    for count in range(1, counts[-1] + 1):
        right = bisect_right(counts, count)
        low = counts[max(0, right - 1)]
        high = counts[min(right, len(counts) - 1)]
        if low in (count, high) or count < counts[0]:
            curves.append(measured[low])
            continue
        part = (count - low) / (high - low)
        a, b = measured[low], measured[high]
        queries = tuple(query for query in a.queries if query in b.queries)
        pick_a = [a.queries.index(query) for query in queries]
        pick_b = [b.queries.index(query) for query in queries]
        curves.append(
            _Curve(
                queries,
                tuple(a.ms[i] + part * (b.ms[j] - a.ms[i]) for i, j in zip(pick_a, pick_b, strict=True)),
                tuple(
                    a.by_cached[i] + part * (b.by_cached[j] - a.by_cached[i])
                    for i, j in zip(pick_a, pick_b, strict=True)
                ),
                a.cached + part * (b.cached - a.cached),
            )
        )
    return curves


def _with_single_tokens(curves: list[_Curve]) -> list[_Curve]:
    slopes = [
        max(0.0, (curve.ms[1] - curve.ms[0]) / (curve.queries[1] - curve.queries[0])) / max(1, count)
        if len(curve.queries) > 1
        else 0.0
        for count, curve in enumerate(curves)
    ]
    filled = []
    for count, curve in enumerate(curves):
        if curve.queries[0] <= 1.0:
            filled.append(curve)
            continue
        near = slopes[max(1, round(count / 1.3)) : max(2, round(count * 1.3) + 1)]
        drop = float(numpy.median(near)) * max(1, count) * (curve.queries[0] - 1.0)
        filled.append(
            _Curve(
                (1.0, *curve.queries),
                (max(curve.ms[0] - drop, 0.5 * curve.ms[0]), *curve.ms),
                (curve.by_cached[0], *curve.by_cached),
                curve.cached,
            )
        )
    return filled


def _curve(by_cached: dict[float, dict[float, float]]) -> _Curve:
    lowest, highest = min(by_cached), max(by_cached)
    low, high = by_cached[lowest], by_cached[highest]
    queries = sorted(set(low) & set(high))
    if not queries:
        raise TableError("every number of cached tokens wants the same numbers of query tokens")
    span = highest - lowest
    return _Curve(
        tuple(queries),
        tuple(low[query] for query in queries),
        tuple(max(0.0, (high[query] - low[query]) / span) if span else 0.0 for query in queries),
        lowest,
    )
