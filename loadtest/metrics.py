"""Figures of a load test, as AIPerf and `vllm bench serve` define them; docs/loadtest.md compares names.

Blocks of tokens arrive in bursts. So time a token (TPOT: an average over a request) and time between chunks
(what a reader sees) are different figures, and both are given; neither is made out of the other.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from loadtest.records import ErrorKind, Record
from loadtest.slo import Slo

PERCENTILES = (50, 90, 95, 99)


def ttft_s(record: Record) -> float | None:
    """Time to first token: from the intended send to the first chunk with text."""
    return record.chunks[0].at_s - record.intended_s if record.chunks else None


def ttst_s(record: Record) -> float | None:
    """Time to second token, AIPerf's: from the first chunk to the second."""
    return record.chunks[1].at_s - record.chunks[0].at_s if len(record.chunks) > 1 else None


def e2e_s(record: Record) -> float | None:
    """Time of the whole answer: from the intended send to the last chunk with text."""
    return record.chunks[-1].at_s - record.intended_s if record.chunks else None


def tpot_s(record: Record) -> float | None:
    """Time per output token: (E2E - TTFT) / (output tokens - 1). AIPerf calls this inter-token latency.

    None without the server's own count of tokens, and for a single token or a single chunk.
    """
    if record.output_tokens is None or record.output_tokens < 2 or len(record.chunks) < 2:
        return None
    return (record.chunks[-1].at_s - record.chunks[0].at_s) / (record.output_tokens - 1)


def inter_chunk_s(record: Record) -> list[float]:
    """Every gap between chunks. `vllm bench serve` calls these inter-token latencies."""
    times = [chunk.at_s for chunk in record.chunks]
    return [after - before for before, after in pairwise(times)]


def meets(record: Record, slo: Slo | None) -> bool:
    """True for a good answer within each target. A figure that one chunk leaves undefined misses nothing."""
    if record.error is not None:
        return False
    if slo is None:
        return True
    pairs = ((slo.ttft_s, ttft_s), (slo.tpot_s, tpot_s), (slo.e2e_s, e2e_s))
    for target, measure in pairs:
        value = measure(record) if target is not None else None
        if target is not None and value is not None and value > target:
            return False
    return True


@dataclass(frozen=True)
class Distribution:
    """The distribution of times in seconds; with a count of 0 it has no figures."""

    count: int
    mean: float | None
    percentiles: Mapping[int, float]
    """Times by percentile, interpolated linearly."""

    @classmethod
    def of(cls, values: Sequence[float]) -> "Distribution":
        if not values:
            return cls(0, None, {})
        found = np.percentile(values, PERCENTILES)
        return cls(
            len(values), float(np.mean(values)), dict(zip(PERCENTILES, map(float, found), strict=True))
        )

    def p(self, percentile: int) -> float | None:
        return self.percentiles.get(percentile)


@dataclass(frozen=True)
class Summary:
    """The figures of one setting's requests at one level; rates are over duration_s, of good answers."""

    num_requests: int
    num_good: int
    errors: Mapping[ErrorKind, int]
    duration_s: float
    """The time from the first intended send to the last end, summed over the turns."""
    ttft: Distribution
    ttst: Distribution
    tpot: Distribution
    inter_chunk: Distribution
    e2e: Distribution
    requests_per_s: float
    tokens_per_s: float
    tokens_per_s_per_user: float | None
    """The mean of the requests' own 1 / TPOT."""
    goodput: float
    """Requests a second within their SLO."""
    attained: float
    """The share of the requests within their SLO."""
    correct: float | None
    """The share of checked answers that are right."""
    tokens_per_forward: float | None
    """Tokens a forward after each first token."""
    tokens_by_mode: Mapping[str, int]
    num_switches: int
    chunks_per_request: float | None
    late_p99_s: float | None
    """The lateness of the client's own sends; if it is large, the client was too slow, not the server."""

    @property
    def error_share(self) -> float:
        return sum(self.errors.values()) / self.num_requests


def summarise(records: Sequence[Record], slos: Mapping[str, Slo]) -> Summary:
    """Summarises the records. slos: by class. Raises ValueError without records."""
    if not records:
        raise ValueError("there are no records to summarise")
    good = [r for r in records if r.error is None]
    duration_s = _duration_s(records)
    num_within = sum(meets(r, slos.get(r.class_name)) for r in records)
    tpots = _known(tpot_s(r) for r in good)
    checked = [r.correct for r in good if r.correct is not None]
    late = _known(None if r.sent_s is None else r.sent_s - r.intended_s for r in records)
    return Summary(
        num_requests=len(records),
        num_good=len(good),
        errors=dict(Counter(r.error for r in records if r.error is not None)),
        duration_s=duration_s,
        ttft=Distribution.of(_known(ttft_s(r) for r in good)),
        ttst=Distribution.of(_known(ttst_s(r) for r in good)),
        tpot=Distribution.of(tpots),
        inter_chunk=Distribution.of([gap for r in good for gap in inter_chunk_s(r)]),
        e2e=Distribution.of(_known(e2e_s(r) for r in good)),
        requests_per_s=len(good) / duration_s,
        tokens_per_s=sum(r.output_tokens or 0 for r in good) / duration_s,
        tokens_per_s_per_user=float(np.mean([1 / t for t in tpots if t > 0])) if any(tpots) else None,
        goodput=num_within / duration_s,
        attained=num_within / len(records),
        correct=sum(checked) / len(checked) if checked else None,
        tokens_per_forward=tokens_per_forward(good),
        tokens_by_mode=tokens_by_mode(good),
        num_switches=sum(r.decoding["switches"] for r in good if r.decoding),
        chunks_per_request=float(np.mean([len(r.chunks) for r in good])) if good else None,
        late_p99_s=float(np.percentile(late, 99)) if late else None,
    )


def _duration_s(records: Sequence[Record]) -> float:
    """The time of all turns together, without what lay between them."""
    spans: dict[int, tuple[float, float]] = {}
    for r in records:
        begin, end = spans.get(r.turn, (math.inf, -math.inf))
        spans[r.turn] = min(begin, r.intended_s), max(end, r.end_s or r.intended_s)
    return max(sum(end - begin for begin, end in spans.values()), 1e-9)


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def tokens_per_forward(records: Iterable[Record]) -> float | None:
    """Tokens a forward over all records, without requests' first tokens, which come of the prefill."""
    reports = [r.decoding for r in records if r.decoding and r.decoding["forwards"]]
    forwards = sum(report["forwards"] for report in reports)
    tokens = sum(sum(report["tokens"].values()) - 1 for report in reports)
    return tokens / forwards if forwards else None


def tokens_by_mode(records: Iterable[Record]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for record in records:
        if record.decoding:
            total.update(record.decoding["tokens"])
    return dict(total)


def tokens_per_forward_over(records: Sequence[Record], edges: Sequence[float]) -> list[float]:
    """Tokens a forward of requests that ended between two edges (seconds since the epoch); nan for none."""
    found = [tokens_per_forward(_ended_between(records, low, high)) for low, high in pairwise(edges)]
    return [math.nan if value is None else value for value in found]


def _ended_between(records: Iterable[Record], low_s: float, high_s: float) -> list[Record]:
    return [r for r in records if r.end_s is not None and low_s <= r.end_s < high_s]


def mode_shares(records: Sequence[Record], edges: Sequence[float]) -> dict[str, list[float]]:
    """Each mode's share of the tokens of the requests that ended between two edges (seconds since the epoch).

    A request's tokens count where it ended, since its report comes last. nan where none ended.
    """
    bins = [tokens_by_mode(_ended_between(records, low, high)) for low, high in pairwise(edges)]
    modes = sorted({mode for found in bins for mode in found})
    return {
        mode: [
            found.get(mode, 0) / total if (total := sum(found.values())) else float("nan") for found in bins
        ]
        for mode in modes
    }
