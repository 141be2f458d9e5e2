"""Learns the lengths of completions, and tells from them what a running one is still to generate."""

from itertools import pairwise
from math import exp, sqrt

NUM_BUCKETS = 48
"""The number of buckets of lengths, half an octave each; the last has no end."""
HALF_LIFE = 32.0
"""The number of completions after which an older one counts half."""
MAX_WEIGHT = 2.0**20
MIN_WEIGHT = 1e-9
"""The weight at which a forgotten completion says nothing any more."""

_STARTS = [0.0, *(sqrt(2.0) ** (bucket - 1) for bucket in range(1, NUM_BUCKETS + 1))]


class CompletionLengths:
    """A product-limit estimate (Kaplan and Meier 1958; by buckets, as in a life table).

    A completion that max_tokens cuts says only that its text would have gone on, so it makes none look short.
    A completion that has come this far is weighed against those that did too: of texts that are all alike
    half is left on average, and where most are short, those that run are mostly the long ones.
    """

    def __init__(self) -> None:
        self._weight = 1.0  # of the next completion: it grows, rather than that all others fade
        self._noted = [0.0, 0.0]  # completions, and their tokens
        self._reached = [0.0] * NUM_BUCKETS  # completions that became as long as the bucket's start
        self._ended = [0.0] * NUM_BUCKETS  # those that ended in it by themselves
        self._offsets = [0.0] * NUM_BUCKETS  # tokens from the bucket's start to these ends, added up
        # What follows from that, of a text of the length at a bucket's start:
        self._chances = [1.0] * NUM_BUCKETS  # that texts become so long
        self._passed = [0.0] * NUM_BUCKETS  # tokens expected before
        self._ends = [0.0] * NUM_BUCKETS  # the chance that it ends in the bucket
        self._stays = [0.0] * NUM_BUCKETS  # the tokens it is expected to have there
        self._is_reckoned = False

    @property
    def mean(self) -> float | None:
        """The tokens of a completion on average, whole or cut; None before one has ended."""
        count, tokens = self._noted
        return tokens / count if count else None

    def note(self, num_tokens: int, is_whole: bool) -> None:
        """Notes a completion that has ended.

        is_whole: by itself, and not for want of max_tokens
        """
        last, weight = _bucket(num_tokens), self._weight
        self._noted = [self._noted[0] + weight, self._noted[1] + weight * num_tokens]
        for bucket in range(last + 1):
            self._reached[bucket] += weight
        if is_whole:
            self._ended[last] += weight
            self._offsets[last] += weight * (num_tokens - _STARTS[last])
        self._weight *= 2.0 ** (1.0 / HALF_LIFE)
        if self._weight > MAX_WEIGHT:
            for counts in (self._noted, self._reached, self._ended, self._offsets):
                counts[:] = [count / self._weight for count in counts]
            self._weight = 1.0
        self._is_reckoned = False

    def remaining(self, num_tokens: int, max_more: int) -> float:
        """Tokens still expected of a completion of num_tokens that goes on, and may have max_more."""
        if not self._is_reckoned:
            self._reckon()
        here, passed = self._at(num_tokens)
        if here >= MIN_WEIGHT:
            expected = (self._at(num_tokens + max_more)[1] - passed) / here
        else:  # longer than any known one
            bucket = _bucket(num_tokens)
            ends = self._ends[bucket]
            expected = self._stays[bucket] / ends if ends else float(max_more)
        return min(float(max_more), max(1.0, expected))

    def _at(self, num_tokens: int) -> tuple[float, float]:
        """The chance that a text becomes this long, and the tokens expected up to there."""
        bucket = _bucket(num_tokens)
        chance, start = self._chances[bucket], _STARTS[bucket]
        part = (num_tokens - start) / (_STARTS[bucket + 1] - start)
        here = chance * (1.0 - part * self._ends[bucket])
        return here, self._passed[bucket] + chance * part * self._stays[bucket]

    def _reckon(self) -> None:
        chance, passed, hazard = 1.0, 0.0, 0.0
        for bucket, (start, after) in enumerate(pairwise(_STARTS)):
            width = after - start
            if self._reached[bucket] > MIN_WEIGHT * self._weight:
                reached, ended = self._reached[bucket], self._ended[bucket]
                went_on = self._reached[bucket + 1] if bucket + 1 < NUM_BUCKETS else 0.0
                cut = max(0.0, reached - ended - went_on)  # taken to have been there half the way
                ends = min(1.0, ended / (reached - 0.5 * cut))
                offset = self._offsets[bucket] / ended if ended else 0.0
                stay = (1.0 - ends) * width + ends * offset
                hazard = min(1.0, ends / stay) if stay > 0.0 else 1.0
            else:  # longer than any known one: it goes on as the longest did
                ends = 1.0 - exp(-hazard * width)
                stay = ends / hazard if hazard else width
            self._chances[bucket], self._passed[bucket] = chance, passed
            self._ends[bucket], self._stays[bucket] = ends, stay
            passed += chance * stay
            chance *= 1.0 - ends
        self._is_reckoned = True


def _bucket(num_tokens: int) -> int:
    return min((num_tokens * num_tokens).bit_length(), NUM_BUCKETS - 1)
