"""Draws the forwards that a request takes in each mode, by the published acceptance figures.

Self-speculation: each drafted token agrees with chance p, which is the request's own, so a round brings
(1 - p^B) / (1 - p) tokens on average. p is drawn from a Beta distribution about its category's mean. Its
spread is fitted to the published growth of acceptance with the block, which one p for all requests can't
have; each mean to its category's published acceptance. Diffusion: tokens a forward as published, the same for
every request, since nothing finer is.
"""

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy
from numpy.typing import NDArray

from policies.modes import DecodePlan, Mode

DATA = Path(__file__).parents[1] / "data"
NUM_CHANCES = 2001
"""The number of chances of agreement that are told apart."""


@dataclass(frozen=True, slots=True)
class Acceptance:
    """The published acceptance, as distributions of p."""

    means: dict[str, float]
    """The mean of p, by category."""
    spread: float
    """alpha + beta of the Beta distribution about the means."""
    diffusion: float
    """Tokens a forward of diffusion at block 32 and threshold 0.9."""

    @property
    def categories(self) -> tuple[str, ...]:
        return tuple(self.means)

    def draw(self, categories: NDArray[numpy.int64], rng: numpy.random.Generator) -> NDArray[numpy.int64]:
        """Draws for each request, given the index of its category, the index of its p."""
        means = numpy.array(list(self.means.values()))[categories]
        chances = rng.beta(means * self.spread, (1.0 - means) * self.spread)
        return numpy.minimum((chances * NUM_CHANCES).astype(numpy.int64), NUM_CHANCES - 1)


def load_acceptance(
    model: str = "8b", path: Path = DATA / "acceptance.json", scale: float = 1.0
) -> Acceptance:
    """Reads a model's published figures; scale multiplies each category's tokens a round, to see what if."""
    figures = json.loads(path.read_text())
    blocks = {int(block): float(value) for block, value in figures["accepted_by_block_8b"].items()}
    spread = _fit_spread(blocks)
    means = {
        name: mean_chance(min(31.0, max(1.01, 1.0 + (value - 1.0) * scale)), 32, spread)
        for name, value in figures["tokens_a_round_block_32"].items()
    }
    return Acceptance(
        means, spread, 1.0 + (figures["diffusion_tokens_a_forward_block_32"][model] - 1.0) * scale
    )


def tokens_a_round(mean: float, spread: float, block_length: int) -> float:
    """The mean of (1 - p^B) / (1 - p) = 1 + p + ... + p^(B-1) over p ~ Beta(mean, spread)."""
    alpha, total, moment = mean * spread, 1.0, 1.0
    for power in range(block_length - 1):
        moment *= (alpha + power) / (spread + power)
        total += moment
    return total


def mean_chance(tokens: float, block_length: int, spread: float) -> float:
    """The mean p at which a round brings so many tokens."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if tokens_a_round(middle, spread, block_length) < tokens else (low, middle)
    return (low + high) / 2


def _fit_spread(blocks: dict[int, float]) -> float:
    """The spread at which the mean that explains the largest block best explains the others too."""
    largest = max(blocks)

    def error(spread: float) -> float:
        mean = mean_chance(blocks[largest], largest, spread)
        return sum(
            (tokens_a_round(mean, spread, block) / value - 1.0) ** 2 for block, value in blocks.items()
        )

    return min((float(spread) for spread in numpy.geomspace(2.0, 200.0, 200)), key=error)


class Rounds:
    """The forwards that a request of given p takes for a number of tokens, under one plan."""

    def __init__(self, plan: DecodePlan, diffusion: float):
        self.plan = plan
        self.block_length = plan.block_length
        self._diffusion = diffusion
        self._is_speculation = plan.mode is Mode.SELF_SPECULATION

    @property
    def wanted(self) -> float:
        """Positions a forward whose logits are wanted, on average: a draft's and a verify's, or, of a block
        of diffusion, those still masked, which are half of it."""
        if self._is_speculation:
            return self.block_length - 0.5
        return 1.0 if self.block_length == 1 else self.block_length / 2.0

    @cached_property
    def _moments(self) -> tuple[list[float], list[float]]:
        """Mean and variance of a round's tokens, for each index of p."""
        chances = ((numpy.arange(NUM_CHANCES) + 0.5) / NUM_CHANCES)[:, None]
        counts = numpy.arange(1, self.block_length + 1)
        weights = chances ** (counts - 1) * numpy.where(counts < self.block_length, 1.0 - chances, 1.0)
        mean = weights @ counts
        return mean.tolist(), (weights @ counts**2 - mean**2).tolist()

    def forwards(self, chance_index: int, num_tokens: float, luck: float) -> float:
        """The forwards for num_tokens, at least those of full blocks. luck: a standard normal."""
        if self._is_speculation:
            means, variances = self._moments
            mean, variance = means[chance_index], variances[chance_index]
            # Renewal theory: Wald's identity with the mean overshoot of a lattice walk.
            overshoot = (variance + mean * mean) / (2.0 * mean) - 0.5
            rounds = (num_tokens + overshoot) / mean + luck * math.sqrt(num_tokens * variance / mean**3)
            least = math.ceil(num_tokens / self.block_length)
            return 2.0 * max(least, min(float(round(rounds)), num_tokens))
        if self.block_length == 1:
            return num_tokens
        # The last block ends with the text, so on average it costs what its tokens do.
        blocks = math.ceil(num_tokens / self.block_length)
        return max(2.0 * blocks, num_tokens / self._diffusion)

    def pace(self, chance_index: int) -> float:
        """Tokens a forward in the long run."""
        if self._is_speculation:
            return self._moments[0][chance_index] / 2.0
        return 1.0 if self.block_length == 1 else min(self._diffusion, self.block_length / 2)
