"""Admission: the decision to take a request at all, and, if not, when the client is to come back."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from policies.replica_load import ObservedLoad
from router.completion_rate import CompletionRate
from router.config import AdmissionConfig
from router.placement import Candidate, OwnTraffic

MIN_RETRY_AFTER_S = 1.0
MAX_RETRY_AFTER_S = 30.0
LOOK_PERIOD_S = 0.1
"""The period of sums over all replicas; a router's own requests count at once."""


@dataclass(frozen=True, slots=True)
class Admit:
    """The request is taken."""

    queued: bool
    """True if it will wait for a place to run."""


@dataclass(frozen=True, slots=True)
class Shed:
    """The request is refused."""

    retry_after_s: int
    """Whole seconds."""
    contended: bool
    """True if the cluster is full and the client should come back (429); else it has no capacity (503)."""
    reason: str = ""
    """An explanation for people."""


Admission = Admit | Shed


@dataclass(frozen=True, slots=True)
class Occupancy:
    """The replicas that can be reached, taken together."""

    num_replicas: int
    capacity: int
    """Choices that can run at once."""
    num_in_flight: int
    """Choices that run or wait."""
    waiting_tokens: int = 0
    """Prompt tokens that have not begun their prefill."""


def admit(
    occupancy: Occupancy,
    config: AdmissionConfig,
    *,
    num: int = 1,
    num_prompt_tokens: int = 0,
    completions_per_s: float | None = None,
    deadline_s: float | None = None,
) -> Admission:
    """Decide on one more request, which is not among those in `occupancy`.

    num, num_prompt_tokens: this request's choices, and its prompts' tokens
    completions_per_s: the cluster's recent rate, in choices, None or 0 where there was none
    deadline_s: the time this request has left; one that would spend it all in the queue is told so now
    """
    if occupancy.capacity <= 0:
        return Shed(math.ceil(MIN_RETRY_AFTER_S), contended=False, reason="no replica can be reached")
    num_ahead = occupancy.num_in_flight - occupancy.capacity + num  # who must end before all of it runs
    if num_ahead <= 0:
        # A place is free, but prompts may still wait for their prefill.
        return _within_tokens(occupancy, config, num_prompt_tokens, completions_per_s) or Admit(queued=False)
    num_too_many = num_ahead - config.max_waiting * occupancy.num_replicas
    if num_too_many > 0:
        return _full(num_too_many, completions_per_s, "the queue is full")
    over = _within_tokens(occupancy, config, num_prompt_tokens, completions_per_s)
    if over is not None:
        return over
    if completions_per_s:
        wait_s = num_ahead / completions_per_s
        patience_s = min(
            math.inf if config.max_queue_s is None else config.max_queue_s,
            math.inf if deadline_s is None else deadline_s,
        )
        if wait_s > patience_s:
            excess = num_ahead - patience_s * completions_per_s
            reason = f"a place comes free in about {wait_s:.0f} s, and the limit is {patience_s:.0f} s"
            return _full(excess, completions_per_s, reason)
    return Admit(queued=True)


def _within_tokens(
    occupancy: Occupancy, config: AdmissionConfig, num_prompt_tokens: int, completions_per_s: float | None
) -> Shed | None:
    if config.max_waiting_tokens is None or occupancy.waiting_tokens == 0:
        return None
    allowed = config.max_waiting_tokens * occupancy.num_replicas
    if occupancy.waiting_tokens + num_prompt_tokens <= allowed:
        return None
    return _full(1, completions_per_s, f"{occupancy.waiting_tokens} prompt tokens wait already")


def _full(num_too_many: float, completions_per_s: float | None, reason: str) -> Shed:
    wait_s = num_too_many / completions_per_s if completions_per_s else MIN_RETRY_AFTER_S
    wait_s = min(max(wait_s, MIN_RETRY_AFTER_S), MAX_RETRY_AFTER_S)
    return Shed(math.ceil(wait_s), contended=True, reason=reason)


class AdmissionControl:
    """One router's admission, by what it sees of the replicas and what it has sent them since.

    A replica that has not published its load has the configured places. Everything is counted in choices,
    each of which takes a place. `traffic`, which is to be told of this router's requests, counts at once.
    `now_s` is any clock that only moves forward. Not for use by several threads at once.
    """

    def __init__(self, config: AdmissionConfig):
        self.traffic = OwnTraffic()
        self._config = config
        self._completions = CompletionRate()
        self._looked_s = -math.inf
        self._replica_ids: Sequence[str] = ()
        # As of the last look.
        self._occupancy = Occupancy(0, 0, 0)
        self._num_own = 0
        self._num_tokens_sent = 0

    @property
    def max_choices(self) -> int:
        """The choices one request may have at most: those that a replica can have, running and waiting."""
        return self._config.max_running + self._config.max_waiting

    def check(
        self,
        replica_ids: Sequence[str],
        seen: Callable[[str], ObservedLoad | None],
        now_s: float,
        *,
        num: int = 1,
        num_prompt_tokens: int = 0,
        deadline_s: float | None = None,
    ) -> Admission:
        """Decides on one more request.

        replica_ids: those that can be reached
        seen: a replica's load, its age as of now_s; asked for now and then
        num: the request's choices
        """
        if now_s - self._looked_s >= LOOK_PERIOD_S or replica_ids != self._replica_ids:
            self._look(replica_ids, seen, now_s)
        return admit(
            self._occupancy_now(),
            self._config,
            num=num,
            num_prompt_tokens=num_prompt_tokens,
            completions_per_s=self._completions.per_s,
            deadline_s=deadline_s,
        )

    def _look(
        self, replica_ids: Sequence[str], seen: Callable[[str], ObservedLoad | None], now_s: float
    ) -> None:
        candidates = self.traffic.candidates(replica_ids, seen, now_s)
        self._looked_s, self._replica_ids = now_s, replica_ids
        self._num_own, self._num_tokens_sent = self.traffic.num_in_flight, self.traffic.num_tokens_sent
        self._occupancy = Occupancy(
            num_replicas=len(candidates),
            capacity=sum(self._places(candidate) for candidate in candidates),
            num_in_flight=sum(candidate.num_in_flight for candidate in candidates),
            waiting_tokens=sum(candidate.waiting_prompt_tokens for candidate in candidates),
        )
        is_full = self._occupancy.num_in_flight >= self._occupancy.capacity
        self._completions.note((c.seen for c in candidates if c.seen is not None), now_s, is_full)

    def _occupancy_now(self) -> Occupancy:
        """The occupancy of the last look, with what this router has sent since and without what has ended."""
        num_more = self.traffic.num_in_flight - self._num_own
        num_more_tokens = self.traffic.num_tokens_sent - self._num_tokens_sent
        if not num_more and not num_more_tokens:
            return self._occupancy
        return replace(
            self._occupancy,
            num_in_flight=max(0, self._occupancy.num_in_flight + num_more),
            waiting_tokens=max(0, self._occupancy.waiting_tokens + num_more_tokens),
        )

    def _places(self, candidate: Candidate) -> int:
        return self._config.max_running if candidate.seen is None else candidate.seen.load.max_running
