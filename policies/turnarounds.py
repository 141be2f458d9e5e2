"""The clients that are between two requests, and for how long, as a server sees them: by ends and arrivals.

An arrival is taken for the next request of the client whose last one ended last. Which client it really is of
does not matter: however arrivals and ends are paired, the times between them have the same sum. But so those
who never come back are left over, and told by their age; were the first to end the first to come back, they
would be renewed for ever by the others.
"""

import math
from collections import deque

LASTING_S = 0.5
"""The time after which a client that has not asked again is taken to have gone."""
GRACE = 4.0
"""The mean turnarounds after which those who have not asked again count only as far as arrivals bear them
out: of exponential times one in fifty is longer."""
BORNE_OUT = 2.0
"""That number over the one which arrivals within the grace make by Little's law, so that chance leaves nobody
out."""
NUM_REMEMBERED = 16.0
"""The number of turnarounds over which their mean is taken, an older one counting less."""


class Turnarounds:
    """Counts the clients between two requests, and learns how long they are."""

    def __init__(self) -> None:
        self._ended_s: deque[float] = deque()
        self._arrived_s: deque[float] = deque()
        self._mean_s = self._weight = 0.0

    @property
    def mean_s(self) -> float:
        """Seconds from an end to the same client's next arrival, on average; 0 before any was seen."""
        return self._mean_s

    def num_between(self, now_s: float) -> int:
        """Returns the number of clients whose last request ended, and whose next is to come."""
        self._forget(now_s)
        if self._weight < NUM_REMEMBERED:
            return len(self._ended_s)
        grace_s = GRACE * self._mean_s
        num_late = sum(ended_s < now_s - grace_s for ended_s in self._ended_s)
        num_arrived = sum(arrived_s >= now_s - grace_s for arrived_s in self._arrived_s)
        borne_out = math.ceil(num_arrived * BORNE_OUT / GRACE)
        return len(self._ended_s) - max(0, num_late - borne_out)

    def ended(self, now_s: float) -> None:
        """Notes that a request has ended. now_s: a clock that moves forward, the same for all calls."""
        self._ended_s.append(now_s)

    def arrived(self, now_s: float) -> None:
        """Notes that a request has arrived."""
        self._forget(now_s)
        self._arrived_s.append(now_s)
        if self._ended_s:
            self._weight = min(self._weight + 1.0, NUM_REMEMBERED)
            self._mean_s += (now_s - self._ended_s.pop() - self._mean_s) / self._weight

    def _forget(self, now_s: float) -> None:
        for times_s in (self._ended_s, self._arrived_s):
            while times_s and times_s[0] <= now_s - LASTING_S:
                times_s.popleft()
