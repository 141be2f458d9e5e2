"""Whether the cluster can take one more request, from what this router knows."""

from collections import deque
from collections.abc import Sequence

from policies.admission import Shed, admit
from policies.load import Freshness
from policies.placement import Candidate
from replicas.errors import ErrorCode
from router.errors import Overloaded

RATE_WINDOW_S = 10.0


class AdmissionControl:
    """max_running, max_waiting: of one replica, as configured; a replica's published load says better.

    `now_s` is any clock that only moves forward.
    """

    def __init__(self, max_running: int, max_waiting: int):
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._ended_s: deque[float] = deque()

    def ended(self, now_s: float) -> None:
        """A request has finished: the rate at which places come free."""
        self._ended_s.append(now_s)
        self._trim(now_s)

    def check(self, candidates: Sequence[Candidate], now_s: float) -> None:
        """Raises Overloaded: UNAVAILABLE without any candidate, QUEUE_FULL when all places are taken."""
        self._trim(now_s)
        capacity = sum(self._places(candidate) for candidate in candidates)
        verdict = admit(
            num_in_flight=sum(_in_flight(candidate) for candidate in candidates),
            capacity=capacity,
            max_queued=self._max_waiting * len(candidates),
            completions_per_s=len(self._ended_s) / RATE_WINDOW_S,
        )
        if not isinstance(verdict, Shed):
            return
        if verdict.contended:
            message = f"The server is full; try again in {verdict.retry_after_s} s."
            raise Overloaded(ErrorCode.QUEUE_FULL, message, verdict.retry_after_s)
        raise Overloaded(ErrorCode.UNAVAILABLE, "No replica can take the request.", verdict.retry_after_s)

    def _places(self, candidate: Candidate) -> int:
        return self._max_running if candidate.seen is None else candidate.seen.load.max_running

    def _trim(self, now_s: float) -> None:
        while self._ended_s and self._ended_s[0] < now_s - RATE_WINDOW_S:
            self._ended_s.popleft()


def _in_flight(candidate: Candidate) -> int:
    if candidate.seen is None or candidate.freshness is Freshness.LOST:
        return candidate.num_own
    return max(candidate.seen.load.num_in_flight + candidate.num_since, candidate.num_own)
