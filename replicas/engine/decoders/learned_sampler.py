"""A sampler fitted on a checkpoint's own guesses: how likely is each of a denoising to be what `ar` says?

The trust in a guess is a logistic regression over what the engine knows of a denoising anyway: the
probabilities of all its guesses, and where they stand. Of the guesses, the most trusted first, as many are
fixed as leave the wrong ones to expect of the forward, the sum of one less each trust, within a risk; the
first one always is.

Where the model is surer of any guess, none is trusted less.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from math import exp, log, log1p

from policies.modes import MAX_BLOCK_LENGTH

MAX_ODDS = 16.0
"""The largest log-odds that a probability counts for, either way."""
LEAST_DOUBT = 1e-6
"""Added to the sum of doubts before its logarithm."""
_LOG1P = tuple(log1p(number) for number in range(MAX_BLOCK_LENGTH))


@dataclass(frozen=True, slots=True)
class Weights:
    """What each fact adds to the log-odds of a guess's being right."""

    bias: float
    odds: float
    """Of the log-odds of the guess's probability; at least 0."""
    doubts: float
    """Of the logarithm of all the guesses' doubts together, one less each probability; at most 0."""
    place: float
    """Of the logarithm of 1 + the guess's place in the block, the seed's being 0."""
    length: float
    """Of the logarithm of the block's length."""
    seed_hidden: float
    """Where the seed was masked too, as it is in a block's first denoising."""


@dataclass(frozen=True, slots=True)
class LearnedSampler:
    """The sampler of a checkpoint."""

    weights: Weights
    risk: float
    """The wrong guesses to expect of a forward, at most, unless a request says otherwise."""

    def log_odds(
        self, block_length: int, places: Seq[int], probs: Seq[float], seed_hidden: bool
    ) -> list[float]:
        """The log-odds of each guess's being right.

        places: of the guesses in the block. probs: their probabilities, as many.
        """
        weights = self.weights
        common = weights.bias + weights.length * log(block_length) + weights.seed_hidden * seed_hidden
        common += weights.doubts * log(sum(1.0 - prob for prob in probs) + LEAST_DOUBT)
        return [
            common + weights.odds * log_odds(prob) + weights.place * _LOG1P[place]
            for place, prob in zip(places, probs, strict=True)
        ]


def log_odds(prob: float) -> float:
    """The log-odds of a probability, from -MAX_ODDS to MAX_ODDS."""
    if not 0.0 < prob < 1.0:
        return MAX_ODDS if prob else -MAX_ODDS
    return max(-MAX_ODDS, min(MAX_ODDS, log(prob / (1.0 - prob))))


def num_within(risk: float, ranked: Seq[float]) -> int:
    """The number of guesses that a risk lets be fixed, of these log-odds of being right, the highest
    first."""
    expected = 0.0
    for count, odds in enumerate(ranked):
        expected += exp(-odds) if odds > MAX_ODDS else 1.0 / (1.0 + exp(odds))
        if expected > risk:
            return count
    return len(ranked)
