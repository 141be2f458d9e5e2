"""What a learned sampler fixes, by its definition alone."""

import math
from collections.abc import Mapping

from replicas.engine.decoders.learned_sampler import LearnedSampler, Weights

SAMPLER = LearnedSampler(
    Weights(bias=0.9, odds=0.8, doubts=-0.4, place=-0.5, length=0.35, seed_hidden=0.25), risk=0.7
)


def trust_in(
    sampler: LearnedSampler, block_length: int, probs: Mapping[int, float], is_seed_hidden: bool
) -> dict[int, float]:
    """The chance that the guess at each place of a block is right. probs: their probabilities, by place."""
    weights = sampler.weights
    doubts = math.fsum(1.0 - prob for prob in probs.values())
    found = {}
    for place, prob in probs.items():
        odds = math.log(prob) - math.log(1.0 - prob) if 0.0 < prob < 1.0 else math.copysign(99.0, prob - 0.5)
        log_odds = weights.bias + weights.odds * min(16.0, max(-16.0, odds))
        log_odds += weights.doubts * math.log(doubts + 1e-6) + weights.place * math.log(1 + place)
        log_odds += weights.length * math.log(block_length) + (weights.seed_hidden if is_seed_hidden else 0.0)
        found[place] = log_odds
    return {place: 1.0 / (1.0 + math.exp(-log_odds)) for place, log_odds in found.items()}


def places_fixed(
    sampler: LearnedSampler,
    risk: float,
    block_length: int,
    probs: Mapping[int, float],
    is_seed_hidden: bool,
) -> list[int]:
    """The places that a risk lets be fixed, the most trusted first; one at least."""
    trust = trust_in(sampler, block_length, probs, is_seed_hidden)
    ranked = sorted(trust, key=lambda place: -trust[place])
    counts = range(1, len(ranked) + 1)
    within = [count for count in counts if sum(1.0 - trust[place] for place in ranked[:count]) <= risk]
    return ranked[: max(within, default=1)]
