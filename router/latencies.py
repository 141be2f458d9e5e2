"""Latencies of the requests that have ended lately, for people who watch; Prometheus has its histograms."""

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil

from policies.control.loop import Clock

WINDOW_S = 60.0
MAX_KEPT = 2048


@dataclass(frozen=True, slots=True)
class RequestLatency:
    """One request's latencies, as the ingress that answered it saw them."""

    ended_s: float
    """The time of its end, on the clock of RecentLatencies."""
    replica_id: str
    ttft_s: float
    """From request to first token."""
    tpot_s: float | None
    """A token after the first; None where there was no other."""


class RecentLatencies:
    """The latencies of an ingress's last requests: at most MAX_KEPT, none older than WINDOW_S when read."""

    def __init__(self, clock: Clock = time.monotonic):
        self._clock = clock
        self._kept: deque[RequestLatency] = deque(maxlen=MAX_KEPT)

    def note(self, replica_id: str, ttft_s: float, tpot_s: float | None) -> None:
        self._kept.append(RequestLatency(self._clock(), replica_id, ttft_s, tpot_s))

    def recent(self) -> tuple[RequestLatency, ...]:
        """The latencies of the last WINDOW_S seconds, oldest first."""
        since_s = self._clock() - WINDOW_S
        while self._kept and self._kept[0].ended_s < since_s:
            self._kept.popleft()
        return tuple(self._kept)


def summary(latencies: Iterable[RequestLatency]) -> dict[str, float | int | None]:
    """The number of requests and the medians and 95th percentiles of both latencies, in seconds."""
    found = tuple(latencies)
    ttfts = sorted(each.ttft_s for each in found)
    tpots = sorted(each.tpot_s for each in found if each.tpot_s is not None)
    return {
        "num_requests": len(found),
        "ttft_p50_s": quantile(ttfts, 0.5),
        "ttft_p95_s": quantile(ttfts, 0.95),
        "tpot_p50_s": quantile(tpots, 0.5),
        "tpot_p95_s": quantile(tpots, 0.95),
    }


def quantile(ordered: Sequence[float], share: float) -> float | None:
    """The smallest value that at least this share of the values does not exceed; None where there is none."""
    return ordered[max(1, ceil(share * len(ordered))) - 1] if ordered else None
