"""The rate at which places come free in the whole cluster, from the loads that every router reads."""

from collections import deque
from collections.abc import Iterable

from policies.replica_load import Freshness, ObservedLoad

WINDOW_S = 30.0
SAMPLE_S = 0.5
"""The period at which a sample is kept within the window."""
MIN_COMPLETIONS = 8
"""The completions below which nothing is said of the rate."""


class CompletionRate:
    """Choices that end in a second, in whatever way, at all replicas together.

    Each replica publishes how many have ended there since its start, so the rate is the same for every
    router, however many share the cluster. Only while all places are taken is it the rate at which places
    come free; what ends before is what arrived. Not for use by several threads at once.
    """

    def __init__(self) -> None:
        self.per_s: float | None = None
        """The rate as of the last note; None while places are free, and until enough has ended."""
        self._last: dict[str, tuple[float, int]] = {}  # when measured, and the count
        self._num_ended = 0
        self._elapsed_s = 0.0
        self._samples: deque[tuple[float, int]] = deque()

    def note(self, loads: Iterable[ObservedLoad], now_s: float, is_full: bool) -> None:
        """Counts what has ended since the last note.

        loads: those of the replicas that can be reached, their ages as of now_s
        is_full: no place is free
        """
        last, self._last = self._last, {}
        elapsed_s, num_known = 0.0, 0
        for seen in loads:
            if seen.freshness is Freshness.LOST:
                continue
            replica_id, measured_s, num = seen.load.replica_id, now_s - seen.age_s, seen.load.num_ended
            before_s, before = last.get(replica_id, (measured_s, num))
            if num < before:  # one that has begun anew under its old name
                before_s, before = measured_s, num
            num_known += replica_id in last
            elapsed_s += max(0.0, measured_s - before_s)
            self._num_ended += num - before
            self._last[replica_id] = (measured_s, num)
        # The counts are as old as the loads, so the time between them is the loads' too.
        self._elapsed_s += elapsed_s / max(1, num_known)
        self._sample(is_full)

    def _sample(self, is_full: bool) -> None:
        if not is_full:
            self._samples.clear()
            self.per_s = None
            return
        samples = self._samples
        if not samples or self._elapsed_s - samples[-1][0] >= SAMPLE_S:
            samples.append((self._elapsed_s, self._num_ended))
        while samples[0][0] < self._elapsed_s - WINDOW_S:
            samples.popleft()
        since_s, before = samples[0]
        num, elapsed_s = self._num_ended - before, self._elapsed_s - since_s
        self.per_s = num / elapsed_s if num >= MIN_COMPLETIONS and elapsed_s > 0 else None
