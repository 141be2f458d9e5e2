"""The choice of the replica that a request goes to.

Every candidate has a score in places, as shares of a replica's: how full it is, less what it has of the
prompt already, plus what its running requests and this one would cost each other. The lowest wins.
The affinities are bounded, so neither ever sends a request to a replica that is fuller than the
emptiest one compared by more than PREFIX_WEIGHT + MODE_WEIGHT: as in consistent hashing with
bounded loads (arXiv 1608.01350), a hot prefix spills over instead of piling up.
"""

import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from policies.modes import Mode
from policies.replica_load import LOST_S, Freshness, ObservedLoad

MAX_COMPARED = 8
"""The most replicas that are all compared; past it two drawn at random and those that have the prompt's
beginning. Two choices (Mitzenmacher 2001) keep many routers with the same picture from all choosing
the same replica, and a choice among thousands as cheap as one among ten."""
MAX_FAVOURED = 2
"""The replicas that have the prompt's beginning and are compared beyond the two drawn at random."""

PREFIX_WEIGHT = 0.25
"""The share of a replica's places that a prompt cached in full outweighs."""
MODE_WEIGHT = 0.15
"""The share of a replica's places that running requests of the same kind outweigh."""
TOKENS_A_REQUEST = 2048
"""The waiting prompt tokens that weigh as much as one request in flight."""

_LONG_STEPS = frozenset({Mode.DIFFUSION, Mode.SELF_SPECULATION})
"""Modes whose segments are a block long: a step that has them is slow for whoever wants one token of it."""


@dataclass(frozen=True, slots=True)
class PlacementRequest:
    """The knowledge of a request before it is placed."""

    mode: Mode | None = None
    """The mode it pins or is kept to, None where the replica's plan decides."""
    held: Mapping[str, float] = field(default_factory=dict)
    """The share of its prompt that a replica probably has cached, 0 to 1, by replica id."""
    num_prompt_tokens: int = 0
    """An estimate."""


ANY = PlacementRequest()


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica that could take the request; num_... are choices of this router's own requests."""

    replica_id: str
    seen: ObservedLoad | None = None
    """The replica's load as last read, None if it has published none."""
    num_own: int = 0
    """Choices at the replica."""
    num_since: int = 0
    """Choices sent after `seen` was measured, and not ended."""
    tokens_since: int = 0
    """Prompt tokens of the requests of num_since."""
    num_gone: int = 0
    """Choices that `seen` shows, and that have ended."""

    @property
    def freshness(self) -> Freshness:
        return Freshness.LOST if self.seen is None else self.seen.freshness

    @property
    def num_in_flight(self) -> int:
        """Choices at the replica, as far as can be told: a lost load says nothing, own ones always count."""
        if self.seen is None or self.seen.freshness is Freshness.LOST:
            return self.num_own
        return max(self.seen.load.num_in_flight - self.num_gone + self.num_since, self.num_own)

    @property
    def waiting_prompt_tokens(self) -> int:
        """Prompt tokens that have not begun their prefill."""
        if self.seen is None or self.seen.freshness is Freshness.LOST:
            return 0
        return self.seen.load.waiting_prompt_tokens + self.tokens_since


def choose_replica(
    candidates: Sequence[Candidate], rng: random.Random, wanted: PlacementRequest = ANY
) -> str | None:
    """The id of the best of the candidates, None if there are none; ties fall at random.

    Replicas with a fresh load are preferred to those with a stale one, and those to lost ones,
    which may be gone. Where all are lost, because the store is, the router's own counts decide.
    """
    for tier in Freshness:
        reachable = [candidate for candidate in candidates if candidate.freshness is tier]
        if len(reachable) == 1:
            return reachable[0].replica_id
        if reachable:
            return min(reachable, key=lambda candidate: (*_score(candidate, wanted), rng.random())).replica_id
    return None


def pressure(candidate: Candidate) -> float:
    """Requests in flight, and prompts waiting, per place; a lost replica's places are not known."""
    if candidate.seen is None or candidate.freshness is Freshness.LOST:
        return float(candidate.num_own)
    places = max(1, candidate.seen.load.max_running)
    return (candidate.num_in_flight + candidate.waiting_prompt_tokens / TOKENS_A_REQUEST) / places


def _score(candidate: Candidate, wanted: PlacementRequest) -> tuple[float, float]:
    """The candidate's score, the lower the better; then, for ties, the share of pages in use."""
    score = pressure(candidate)
    score -= PREFIX_WEIGHT * min(1.0, max(0.0, wanted.held.get(candidate.replica_id, 0.0)))
    seen = candidate.seen
    if seen is None or seen.freshness is Freshness.LOST:
        return score, 0.0
    if wanted.mode is not None:
        score += MODE_WEIGHT * _strangers(seen.load.running_by_mode, wanted.mode)
    return score, seen.load.pages_used / max(1, seen.load.num_pages)


def _strangers(running_by_mode: Mapping[Mode, int], mode: Mode) -> float:
    """The share of a replica's running requests whose steps are of the other length than this mode's."""
    num_running = sum(running_by_mode.values())
    if not num_running:
        return 0.0
    num_long = sum(num for running, num in running_by_mode.items() if running in _LONG_STEPS)
    return (num_running - num_long if mode in _LONG_STEPS else num_long) / num_running


def shortlist(replica_ids: Sequence[str], held: Mapping[str, float], rng: random.Random) -> Sequence[str]:
    """The replicas worth comparing: all of a few, of many two at random and those that have the prompt."""
    if len(replica_ids) <= MAX_COMPARED:
        return replica_ids
    first = rng.randrange(len(replica_ids))
    second = rng.randrange(len(replica_ids) - 1)
    drawn = [replica_ids[first], replica_ids[second + (second >= first)]]
    favoured = sorted(held, key=lambda replica_id: -held[replica_id])[:MAX_FAVOURED]
    return [*drawn, *(replica_id for replica_id in favoured if replica_id not in drawn)]


@dataclass(slots=True, eq=False)
class Sent:
    """One request at a replica, as OwnTraffic counts it: its choices, and its prompts' tokens."""

    replica_id: str
    at_s: float
    num: int
    num_prompt_tokens: int


class OwnTraffic:
    """One router's own requests by replica, which keep it from ever being blind.

    A request counts as many choices as it has, since each takes a place. `now_s` is any clock that only
    moves forward. Not for use by several threads at once.
    """

    def __init__(self) -> None:
        self.num_in_flight = 0
        """Choices in flight, at all replicas."""
        self.num_tokens_sent = 0
        """Prompt tokens of all requests so far."""
        self._in_flight: Counter[str] = Counter()
        self._sent: dict[str, dict[Sent, None]] = {}  # what has not ended, in order of time
        self._ended: dict[str, deque[tuple[float, Sent]]] = {}  # when, in order

    def started(self, replica_id: str, now_s: float, num_prompt_tokens: int = 0, num: int = 1) -> Sent:
        """Counts a request that has been sent. Returns what `accepted` and `ended` want to be told of it."""
        sent = Sent(replica_id, now_s, num, num_prompt_tokens)
        self._count(sent, num, num_prompt_tokens)
        self._sent.setdefault(replica_id, {})[sent] = None
        return sent

    def accepted(self, sent: Sent, num_prompt_tokens: int, num: int) -> None:
        """Counts an accepted request in full, as the replica has said; before, it may have counted less."""
        if sent in self._sent.get(sent.replica_id, ()):
            self._count(sent, num - sent.num, num_prompt_tokens - sent.num_prompt_tokens)
            sent.num, sent.num_prompt_tokens = num, num_prompt_tokens

    def ended(self, sent: Sent, now_s: float) -> None:
        """Counts the end of a request, in whatever way; once each."""
        del self._sent[sent.replica_id][sent]
        self._count(sent, -sent.num)
        ended = self._ended.setdefault(sent.replica_id, deque())
        ended.append((now_s, sent))
        # Past LOST_S a load is not used any more, so nobody asks what ended before it was measured.
        while ended[0][0] < now_s - LOST_S:
            ended.popleft()

    def begun(self, sent: Sent) -> None:
        """Counts a request's prompts as waiting no more."""
        sent.num_prompt_tokens = 0

    def _count(self, sent: Sent, num: int, num_prompt_tokens: int = 0) -> None:
        self._in_flight[sent.replica_id] += num
        self.num_in_flight += num
        self.num_tokens_sent += num_prompt_tokens

    def forget(self, replica_id: str) -> None:
        """Forgets a replica that is gone, every request at it having ended."""
        for counts in (self._in_flight, self._sent, self._ended):
            counts.pop(replica_id, None)

    def in_flight(self, replica_id: str) -> int:
        """Choices in flight at the replica."""
        return self._in_flight[replica_id]

    def candidate(self, replica_id: str, seen: ObservedLoad | None, now_s: float) -> Candidate:
        """The replica as a candidate; the age of `seen` must be as of `now_s`."""
        num_own = self._in_flight.get(replica_id, 0)
        if seen is None:
            return Candidate(replica_id, None, num_own)
        measured_s = now_s - seen.age_s
        num_since = tokens_since = num_gone = 0
        for sent in reversed(self._sent.get(replica_id, {})):
            if sent.at_s < measured_s:
                break
            num_since += sent.num
            tokens_since += sent.num_prompt_tokens
        for ended_s, sent in reversed(self._ended.get(replica_id, ())):
            if ended_s < measured_s:
                break
            if sent.at_s < measured_s:
                num_gone += sent.num
        return Candidate(replica_id, seen, num_own, num_since, tokens_since, num_gone)

    def candidates(
        self, replica_ids: Iterable[str], seen: Callable[[str], ObservedLoad | None], now_s: float
    ) -> list[Candidate]:
        """One candidate for each replica id.

        seen: a replica's load as last read, its age as of `now_s`
        """
        return [self.candidate(replica_id, seen(replica_id), now_s) for replica_id in replica_ids]


def place(
    replica_ids: Sequence[str],
    traffic: OwnTraffic,
    seen: Callable[[str], ObservedLoad | None],
    now_s: float,
    rng: random.Random,
    wanted: PlacementRequest = ANY,
) -> str | None:
    """The replica for one request, None if there is none. `seen` as for OwnTraffic.candidates.

    Looks at all of them only where they are few or none of those drawn has a fresh load.
    """
    known = set(replica_ids) if wanted.held and len(replica_ids) > MAX_COMPARED else ()
    held = (
        {replica_id: share for replica_id, share in wanted.held.items() if replica_id in known}
        if known
        else {}
    )
    compared = shortlist(replica_ids, held, rng)
    candidates = traffic.candidates(compared, seen, now_s)
    if len(compared) < len(replica_ids) and not any(c.freshness is Freshness.FRESH for c in candidates):
        candidates = traffic.candidates(replica_ids, seen, now_s)
    return choose_replica(candidates, rng, wanted)
