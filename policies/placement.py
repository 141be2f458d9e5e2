"""Which replica a request goes to."""

import random
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from policies.load import LOST_S, Freshness, ObservedLoad

MAX_COMPARED = 8
"""Up to this many candidates the least loaded is taken; past it the better of two drawn at random,
which keeps many routers with the same picture from all choosing the same replica."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica that could take the request.

    seen: its load as last read, None if it has published none. num_own: this router's requests at
    it. num_since: those of them sent after that load was measured.
    """

    replica_id: str
    seen: ObservedLoad | None = None
    num_own: int = 0
    num_since: int = 0

    @property
    def freshness(self) -> Freshness:
        return Freshness.LOST if self.seen is None else self.seen.freshness


def choose_replica(candidates: Sequence[Candidate], rng: random.Random) -> str | None:
    """The id of the replica to send to, None if there are no candidates.

    Replicas with a fresh load are preferred to those with a stale one, and those to lost ones,
    which may be gone. Where all are lost, because the store is, the router's own counts decide.
    """
    for tier in Freshness:
        reachable = [candidate for candidate in candidates if candidate.freshness is tier]
        if reachable:
            # Sampled even where all are compared, so that ties fall at random.
            num_compared = len(reachable) if len(reachable) <= MAX_COMPARED else 2
            return min(rng.sample(reachable, num_compared), key=_pressure).replica_id
    return None


def _pressure(candidate: Candidate) -> tuple[float, float]:
    """Requests per place at the replica, then the share of its pages in use."""
    seen = candidate.seen
    if seen is None or seen.freshness is Freshness.LOST:
        return float(candidate.num_own), 0.0
    num_in_flight = max(seen.load.num_in_flight + candidate.num_since, candidate.num_own)
    pages = seen.load.pages_used / max(1, seen.load.num_pages)
    return num_in_flight / max(1, seen.load.max_running), pages


class OwnTraffic:
    """One router's own requests by replica: what keeps it from ever being blind.

    `now_s` is any clock that only moves forward. Not for use by several threads at once.
    """

    def __init__(self) -> None:
        self._in_flight: Counter[str] = Counter()
        self._sent_s: dict[str, deque[float]] = {}

    def started(self, replica_id: str, now_s: float) -> None:
        self._in_flight[replica_id] += 1
        sent_s = self._sent_s.setdefault(replica_id, deque())
        sent_s.append(now_s)
        # Past LOST_S a load is not used any more, so nobody asks what was sent before it.
        while sent_s[0] < now_s - LOST_S:
            sent_s.popleft()

    def ended(self, replica_id: str) -> None:
        self._in_flight[replica_id] -= 1

    def forget(self, replica_id: str) -> None:
        """The replica is gone, and every request at it has ended."""
        self._in_flight.pop(replica_id, None)
        self._sent_s.pop(replica_id, None)

    def in_flight(self, replica_id: str) -> int:
        return self._in_flight[replica_id]

    def candidates(
        self, replica_ids: Iterable[str], seen: Iterable[ObservedLoad], now_s: float
    ) -> list[Candidate]:
        """One candidate for each replica id. The ages in `seen` must be as of `now_s`."""
        by_id = {observed.load.replica_id: observed for observed in seen}
        return [self._candidate(replica_id, by_id.get(replica_id), now_s) for replica_id in replica_ids]

    def _candidate(self, replica_id: str, seen: ObservedLoad | None, now_s: float) -> Candidate:
        num_since = 0
        if seen is not None:
            measured_s = now_s - seen.age_s
            num_since = sum(sent_s >= measured_s for sent_s in self._sent_s.get(replica_id, ()))
        return Candidate(replica_id, seen, self.in_flight(replica_id), num_since)
