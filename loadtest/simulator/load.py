"""Draws the requests of a simulated run: arrival times, lengths, categories. Seeded.

Arrivals are a Poisson process whose rate follows a profile, by time change: unit-rate arrivals through the
inverse of the integrated rate. All arrays, since there may be millions.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy
from numpy.typing import NDArray

from loadtest.simulator.yields import Acceptance
from policies.modes import DecodePlan

Profile = Callable[[NDArray[numpy.float64], numpy.random.Generator], NDArray[numpy.float64]]
"""Maps times, as shares of the run from 0 to 1, to the rate there as a multiple of the mean rate."""


def _poisson(at: NDArray[numpy.float64], rng: numpy.random.Generator) -> NDArray[numpy.float64]:
    return numpy.ones_like(at)


def _bursty(at: NDArray[numpy.float64], rng: numpy.random.Generator) -> NDArray[numpy.float64]:
    """Stretches at three times the mean and at a third of it, each about 1/60 of the run long."""
    lengths = rng.exponential(1 / 60, 600)
    edges = numpy.cumsum(lengths)
    busy = numpy.searchsorted(edges, at) % 2
    return numpy.where(busy, 3.0, 1 / 3)


def _diurnal(at: NDArray[numpy.float64], rng: numpy.random.Generator) -> NDArray[numpy.float64]:
    """Two days, from a tenth of the mean at night to nearly twice it at noon."""
    return 1.0 - 0.9 * numpy.cos(4 * numpy.pi * at)


def _flash_crowd(at: NDArray[numpy.float64], rng: numpy.random.Generator) -> NDArray[numpy.float64]:
    """A quiet run, and for its middle tenth six times as much."""
    return numpy.where((at >= 0.45) & (at < 0.55), 6.0, 1.0)


PROFILES: dict[str, Profile] = {
    "poisson": _poisson,
    "bursty": _bursty,
    "diurnal": _diurnal,
    "flash_crowd": _flash_crowd,
}


@dataclass(frozen=True, slots=True)
class Mix:
    """The make-up of the requests; lengths in tokens."""

    weights: dict[str, float] = field(default_factory=dict)
    """The weight of each category, 0 for one left out; all weigh the same where it is empty."""
    prompt: float = 600.0
    """The mean length of prompts, which are log-normal."""
    output: float = 250.0
    """The mean length of answers, which are log-normal."""
    sigma: float = 0.7
    """The sigma of both log-normal distributions."""
    max_tokens: int = 1024
    """The limit that clients set, not the length they get."""
    pinned: tuple[tuple[DecodePlan, float], ...] = ()
    """Plans that requests pin, and the share of the requests that pin each."""
    prefix_share: float = 0.0
    """The share of the requests that begin with one of num_prefixes common texts of prefix_tokens tokens."""
    num_prefixes: int = 64
    prefix_tokens: int = 400

    def check(self, acceptance: Acceptance) -> None:
        """Raises ValueError for a mix that can't be, naming what to change."""
        unknown = sorted(set(self.weights) - set(acceptance.categories))
        if unknown:
            raise ValueError(f"no category {unknown[0]!r}; there are {', '.join(acceptance.categories)}")
        shares = [share for _, share in self.pinned]
        if any(share < 0 for share in (*shares, *self.weights.values())) or sum(shares) > 1:
            raise ValueError("weights and shares must not be negative, nor pinned shares above 1 in all")


@dataclass(frozen=True, slots=True)
class Requests:
    """Lists by request number, in order of arrival; lists because they are read one at a time."""

    arrival_s: list[float]
    prompt: list[int]
    output: list[int]
    category: list[int]
    chance: list[int]
    """The index of each one's chance of agreement (Acceptance.draw)."""
    luck: list[float]
    """A standard normal each."""
    pinned: list[DecodePlan | None]
    """The plan that each pins; None for `auto`."""
    prefix: list[int]
    """The common text that each begins with, -1 for none; its tokens are part of the prompt."""
    prefix_tokens: int
    max_tokens: int
    measured: list[tuple[float, float]] | None = None
    """The forwards of each and the query tokens of one of them, where that was measured; else None."""
    reused: list[int] | None = None
    """The prompt tokens found cached for each, where that was measured; else None."""
    has_pins: bool = False

    def __len__(self) -> int:
        return len(self.arrival_s)


def generate(num: int, rate: float, profile: str, mix: Mix, acceptance: Acceptance, seed: int) -> Requests:
    """Draws num requests, `rate` a second. Raises ValueError for an unknown profile or category."""
    if profile not in PROFILES:
        raise ValueError(f"no arrivals {profile!r}; there are {', '.join(PROFILES)}")
    if num < 1 or rate <= 0:
        raise ValueError(f"num and rate must be above 0, got {num} and {rate}")
    mix.check(acceptance)
    rng = numpy.random.default_rng(seed)
    weights = numpy.array(
        [mix.weights.get(name, 0.0 if mix.weights else 1.0) for name in acceptance.categories]
    )
    category = rng.choice(len(weights), size=num, p=weights / weights.sum())
    pinned: list[DecodePlan | None] = [None] * num
    if mix.pinned:
        shares = [share for _, share in mix.pinned]
        choices: list[DecodePlan | None] = [plan for plan, _ in mix.pinned]
        which = rng.choice(len(shares) + 1, size=num, p=[*shares, 1.0 - sum(shares)])
        pinned = [[*choices, None][index] for index in which.tolist()]
    prefixed = rng.random(num) < mix.prefix_share
    prompt = _lengths(rng, num, mix.prompt, mix.sigma, 1, 100_000)
    prompt = numpy.where(prefixed, prompt + mix.prefix_tokens, prompt)
    return Requests(
        arrival_s=arrivals(num, rate, profile, rng).tolist(),
        prompt=prompt.tolist(),
        output=_lengths(rng, num, mix.output, mix.sigma, 2, mix.max_tokens).tolist(),
        category=category.tolist(),
        chance=acceptance.draw(category, rng).tolist(),
        luck=rng.standard_normal(num).tolist(),
        pinned=pinned,
        prefix=numpy.where(prefixed, rng.integers(0, mix.num_prefixes, num), -1).tolist(),
        prefix_tokens=mix.prefix_tokens,
        max_tokens=mix.max_tokens,
        has_pins=bool(mix.pinned),
    )


def arrivals(num: int, rate: float, profile: str, rng: numpy.random.Generator) -> NDArray[numpy.float64]:
    """Draws rising times in seconds, shape [num]."""
    units = numpy.cumsum(rng.exponential(1.0, num))
    at = numpy.linspace(0.0, 1.0, 20_001)
    level = PROFILES[profile]((at[:-1] + at[1:]) / 2, rng)
    expected = numpy.concatenate(([0.0], numpy.cumsum(level)))
    times: NDArray[numpy.float64] = numpy.interp(units / units[-1], expected / expected[-1], at)
    return numpy.asarray(times * (units[-1] / rate))


def _lengths(
    rng: numpy.random.Generator, num: int, mean: float, sigma: float, low: int, high: int
) -> NDArray[numpy.int64]:
    drawn = rng.lognormal(numpy.log(mean) - sigma * sigma / 2, sigma, num)
    tokens: NDArray[numpy.int64] = numpy.clip(numpy.rint(drawn), low, high).astype(numpy.int64)
    return tokens
