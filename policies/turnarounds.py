"""The clients that are between two requests, and for how long, as a server sees them: by ends and arrivals.

An arrival is taken for the next request of the client whose last one ended last. Which client it really is of
does not matter: however arrivals and ends are paired, the times between them have the same sum. But so those
who never come back are left over, and told by their age; were the first to end the first to come back, they
would be renewed for ever by the others.
"""

from collections import deque

LASTING_S = 0.5
"""The time after which a client that has not asked again is taken to have gone; of many that are between two
requests at all times, those that never all were back within it count as gone too."""
NUM_REMEMBERED = 16.0
"""The number of turnarounds over which their mean is taken, an older one counting less."""


class Turnarounds:
    """Counts the clients between two requests, and learns how long they are."""

    def __init__(self) -> None:
        self._ended_s: deque[float] = deque()
        self._mean_s = self._weight = 0.0

    @property
    def mean_s(self) -> float:
        """Seconds from an end to the same client's next arrival, on average; 0 before any was seen."""
        return self._mean_s

    def num_between(self, now_s: float) -> int:
        """Returns the number of clients whose last request ended, and whose next is to come."""
        while self._ended_s and self._ended_s[0] <= now_s - LASTING_S:
            self._ended_s.popleft()
        return len(self._ended_s)

    def ended(self, now_s: float) -> None:
        """Notes that a request has ended. now_s: a clock that moves forward, the same for all calls."""
        self._ended_s.append(now_s)

    def arrived(self, now_s: float) -> None:
        """Notes that a request has arrived."""
        if self.num_between(now_s):
            self._weight = min(self._weight + 1.0, NUM_REMEMBERED)
            self._mean_s += (now_s - self._ended_s.pop() - self._mean_s) / self._weight
