"""Rates over recent seconds, from counters that only grow."""

import math
from collections import Counter
from collections.abc import Callable, Mapping

from policies.modes import Mode

WINDOW_S = 2.0
"""A reading's weight falls to 1/e after this long."""


class DecodingStats:
    """clock: seconds."""

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._seen_s = clock()
        self._num_tokens = 0
        self._tokens: Counter[Mode] = Counter()
        self._forwards: Counter[Mode] = Counter()
        self.tokens_per_s = 0.0
        self.tokens_per_forward: dict[Mode, float] = {}

    def update(self, num_tokens: int, tokens: Mapping[Mode, int], forwards: Mapping[Mode, int]) -> None:
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
        for mode, num_forwards in ran.items():
            ratio = made[mode] / num_forwards
            before = self.tokens_per_forward.get(mode, ratio)
            self.tokens_per_forward[mode] = before + fresh * (ratio - before)
        self._seen_s, self._num_tokens = now_s, num_tokens
        self._tokens, self._forwards = Counter(tokens), Counter(forwards)
