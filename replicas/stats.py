"""What a replica measures of itself: rates over recent seconds, and what its forwards and rounds cost."""

import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from policies.cost import Forward, ReplicaCosts, RoundMade, StepCost
from policies.estimate import CostEstimator, YieldEstimator
from policies.modes import Mode

T = TypeVar("T")

WINDOW_S = 2.0
"""A reading's weight falls to 1/e after this long."""


class DecodingStats:
    """From counters that only grow. clock: seconds."""

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._seen_s = clock()
        self._num_tokens = 0
        self._num_prefilled = 0
        self._prefilled_per_s = 0.0
        self._tokens: Counter[Mode] = Counter()
        self._forwards: Counter[Mode] = Counter()
        self.tokens_per_s = 0.0
        self.tokens_per_forward: dict[Mode, float] = {}

    @property
    def prefill_per_token(self) -> float:
        """Prompt tokens prefilled for each token generated."""
        return self._prefilled_per_s / self.tokens_per_s if self.tokens_per_s > 1e-6 else 0.0

    def update(
        self, num_tokens: int, num_prefilled: int, tokens: Mapping[Mode, int], forwards: Mapping[Mode, int]
    ) -> None:
        """Totals since the start: num_tokens of all kinds; tokens and forwards of rounds, by mode."""
        now_s = self._clock()
        elapsed_s = now_s - self._seen_s
        if elapsed_s <= 0:
            return
        fresh = 1.0 - math.exp(-elapsed_s / WINDOW_S)
        made = Counter(tokens) - self._tokens
        ran = Counter(forwards) - self._forwards
        rate = (num_tokens - self._num_tokens) / elapsed_s
        self.tokens_per_s += fresh * (rate - self.tokens_per_s)
        prefilled = (num_prefilled - self._num_prefilled) / elapsed_s
        self._prefilled_per_s += fresh * (prefilled - self._prefilled_per_s)
        for mode, num_forwards in ran.items():
            ratio = made[mode] / num_forwards
            before = self.tokens_per_forward.get(mode, ratio)
            self.tokens_per_forward[mode] = before + fresh * (ratio - before)
        self._seen_s, self._num_tokens, self._num_prefilled = now_s, num_tokens, num_prefilled
        self._tokens, self._forwards = Counter(tokens), Counter(forwards)


class CostMeter:
    """Learns from what an engine leaves in its two queues, which another thread fills.

    start: from the sweep (replicas.calibration). clock: seconds.
    """

    def __init__(
        self,
        start: StepCost,
        forwards: deque[Forward],
        rounds: deque[RoundMade],
        clock: Callable[[], float],
    ):
        self._clock = clock
        self._forwards = forwards
        self._rounds = rounds
        self._step = CostEstimator(start, clock())
        self._yields = YieldEstimator(clock())

    def update(self) -> ReplicaCosts:
        """Takes what has come since the last call into account."""
        now_s = self._clock()
        self._step.update([forward for forward in _taken(self._forwards) if forward.ms > 0], now_s)
        self._yields.update(_taken(self._rounds), now_s)
        return ReplicaCosts(self._step.cost, self._yields.yields(), self._step.own)


def _taken(queue: deque[T]) -> Iterator[T]:
    while True:
        try:
            yield queue.popleft()
        except IndexError:
            return
