"""Draws the forwards that a request takes in each mode, by the published acceptance figures.

Self-speculation: each drafted token agrees with chance p, which is the request's own, so a verified draft
brings (1 - p^B) / (1 - p) tokens on average. p is drawn from a Beta distribution about its category's mean.
Its spread is fitted to the published growth of acceptance with the block, which one p for all requests can't
have; each mean to its category's published acceptance. Diffusion: positions fixed by a denoising as
published, the same for every request, since nothing finer is.
"""

import json
import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy
from numpy.typing import NDArray

from policies.cost import RoundYield, speculation_round
from policies.modes import DecodePlan, Mode

DATA = Path(__file__).parents[1] / "data"
NUM_CHANCES = 2001
"""The number of chances of agreement that are told apart."""
PUBLISHED_BLOCK = 32
"""The block length of the published figures."""


@dataclass(frozen=True, slots=True)
class Acceptance:
    """The published acceptance, as distributions of p."""

    means: dict[str, float]
    """The mean of p, by category."""
    spread: float
    """alpha + beta of the Beta distribution about the means."""
    diffusion: float
    """Tokens a forward of diffusion at block 32 and threshold 0.9, one block after the other."""

    @property
    def categories(self) -> tuple[str, ...]:
        return tuple(self.means)

    def draw(self, categories: NDArray[numpy.int64], rng: numpy.random.Generator) -> NDArray[numpy.int64]:
        """Draws for each request, given the index of its category, the index of its p."""
        means = numpy.array(list(self.means.values()))[categories]
        chances = rng.beta(means * self.spread, (1.0 - means) * self.spread)
        return numpy.minimum((chances * NUM_CHANCES).astype(numpy.int64), NUM_CHANCES - 1)

    def weights(self, mean: float) -> NDArray[numpy.float64]:
        """The probability of each index of p where p has this mean."""
        chances = (numpy.arange(NUM_CHANCES) + 0.5) / NUM_CHANCES
        alpha, beta = mean * self.spread, (1.0 - mean) * self.spread
        logs = (alpha - 1.0) * numpy.log(chances) + (beta - 1.0) * numpy.log1p(-chances)
        density = numpy.exp(logs - logs.max())
        return numpy.asarray(density / density.sum())


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
    """The tokens of a verified draft: the mean of 1 + p + ... + p^(B-1) over p ~ Beta(mean, spread)."""
    alpha, total, moment = mean * spread, 1.0, 1.0
    for power in range(block_length - 1):
        moment *= (alpha + power) / (spread + power)
        total += moment
    return total


def mean_chance(tokens: float, block_length: int, spread: float) -> float:
    """The mean p at which a verified draft brings so many tokens."""
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
    """The forwards that a request of given p takes for a number of tokens under one plan, and their rows.

    A round of self-speculation is one forward: it verifies a draft whole and has the masks of the next one
    behind that, or, after a refusal, verifies the seed alone. A draft made behind tokens that are only being
    verified is as good here as one made after them. A block of diffusion begins in the forward that commits
    the one before, and is denoised there as well as in a forward of its own.

    diffusion: tokens a forward as published, of blocks of 32, one after the other
    """

    def __init__(self, plan: DecodePlan, diffusion: float):
        self.plan = plan
        self.block_length = plan.block_length
        self._fixed = (PUBLISHED_BLOCK - 1) / (PUBLISHED_BLOCK / diffusion - 1.0)
        self._is_speculation = plan.mode is Mode.SELF_SPECULATION

    @cached_property
    def _units(self) -> "_Units":
        return _Units.of(self.block_length)

    def mean(self, chance_index: int) -> RoundYield:
        """The mean round of a request in the long run."""
        if self._is_speculation:
            units = self._units
            return speculation_round(self.plan, units.verified[chance_index], units.refused[chance_index])
        block = self.block_length
        if block == 1:
            return RoundYield(self.plan, 1.0, 1.0, rows=1.0)
        denoisings = max(1.0, (block - 1) / self._fixed)
        return RoundYield(self.plan, float(block), denoisings, rows=block * (1.0 + 1.0 / denoisings))

    def mean_of(self, running: NDArray[numpy.float64]) -> RoundYield:
        """The mean round of many requests. running: by index of p, how many run at a time; in any unit."""
        shares = running / running.sum()
        one = self.mean(0)
        tokens = one.forwards * float(shares @ numpy.array(self.paces))
        return replace(one, tokens=tokens, rows=float(shares @ numpy.array(self.rows)))

    @cached_property
    def paces(self) -> list[float]:
        """Tokens a forward in the long run, by index of p."""
        return [self.mean(index).tokens_per_forward for index in range(NUM_CHANCES)]

    @cached_property
    def rows(self) -> list[float]:
        """Query tokens a forward in the long run, by index of p."""
        return [self.mean(index).rows_per_forward for index in range(NUM_CHANCES)]

    def wanted(self, rows: float) -> float:
        """Positions a forward whose logits are wanted, on average, of so many rows: all but the draft's first
        mask, or, of a block of diffusion, those still masked, which are half of it."""
        if self._is_speculation:
            return rows - 1.0
        return 1.0 if self.block_length == 1 else self.block_length / 2.0

    def forwards(self, chance_index: int, num_tokens: float, luck: float) -> float:
        """The forwards for num_tokens, a draft being there at first. luck: a standard normal."""
        # The last block of diffusion ends with the text, so on average it costs what its tokens do.
        least = float(math.ceil(num_tokens / self.block_length))
        if not self._is_speculation:
            return max(least, num_tokens / self.paces[chance_index])
        expected, spread = self._units.forwards(chance_index, num_tokens)
        return max(least, min(float(round(expected + luck * spread)), num_tokens))


@dataclass(frozen=True, slots=True)
class _Units:
    """What self-speculation repeats, independently each time: a round with a draft, and, where that is
    refused, the round without one after it. Lists are by index of p."""

    verified: list[float]
    """Tokens of the round with the draft."""
    refused: list[float]
    """The chance that there is a round without one."""
    _rate: list[float]
    """Forwards a token in the long run."""
    _offset: list[float]
    """The forwards beyond that, since the last unit brings more than was needed, or need not end."""
    _variance: list[float]
    """The variance of the forwards, a token."""

    @classmethod
    def of(cls, block_length: int) -> "_Units":
        chances = ((numpy.arange(NUM_CHANCES) + 0.5) / NUM_CHANCES)[:, None]
        made = numpy.arange(1, block_length + 1)  # by the round with the draft
        is_refused = made < block_length
        weights = chances ** (made - 1) * numpy.where(is_refused, 1.0 - chances, 1.0)
        tokens, forwards = made + is_refused, 1 + is_refused
        mean, square = weights @ tokens, weights @ tokens**2
        rate = (weights @ forwards) / mean
        # Renewal theory: Wald's identity with the mean overshoot of a lattice walk; the round without a draft
        # is not needed where the one before it has brought enough.
        overshoot = square / (2.0 * mean) - 0.5
        offset = rate * overshoot - (weights @ (made * is_refused)) / mean
        variance = (
            weights @ forwards**2 - 2.0 * rate * (weights @ (forwards * tokens)) + rate**2 * square
        ) / mean
        return cls(
            (weights @ made).tolist(),
            (weights @ is_refused).tolist(),
            rate.tolist(),
            offset.tolist(),
            numpy.maximum(variance, 0.0).tolist(),
        )

    def forwards(self, chance_index: int, num_tokens: float) -> tuple[float, float]:
        """The mean and the standard deviation of the forwards for num_tokens."""
        expected = num_tokens * self._rate[chance_index] + self._offset[chance_index]
        return expected, math.sqrt(num_tokens * self._variance[chance_index])
