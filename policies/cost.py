"""What decoding costs and brings at one replica: the figures that a decision by cost is made from.

A forward of q query tokens takes L(q, ...) milliseconds (`StepCost`); a round of a plan takes F of
them and brings y tokens (`RoundYield`). With C sequences in a plan of block B the replica makes
C x y / (F x L(C x B)) tokens a second; policies.forecast has the whole of it.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from policies.modes import DecodePlan, Mode

PRIOR_ACCEPTANCE = 0.9
"""Chance that the next drafted token agrees. 0.9 gives 5.7, 8.1 and 9.7 tokens a round at blocks 8, 16
and 32, where Nemotron-Labs-Diffusion-8B was measured at 5.8, 8.5 and 11.4."""
PRIOR_FIXED = 2.7
"""Positions a denoising forward fixes at threshold 0.9: the 8B's 2.57 tokens a forward (arXiv
2607.05722) at block 32, its commit left out."""


class ForwardStats(NamedTuple):
    """One forward as measured.

    num_cached: cached tokens that it read, over all segments. ms: its latency. mode: of most of its
    decoding tokens, None for prompts alone. is_exploration: it ran a plan that is not in force.
    """

    num_tokens: int
    num_segments: int
    num_cached: int
    ms: float
    mode: Mode | None = None
    is_exploration: bool = False


class RoundStats(NamedTuple):
    """One round as it went: plan as asked for, tokens that the request took, forwards, and query tokens in
    these forwards.

    is_clients: the request itself set the plan's parameters or bounded its forwards, so the plan is one that
    no policy may choose.
    """

    plan: DecodePlan
    tokens: int
    forwards: int
    rows: int
    is_clients: bool = False


@dataclass(frozen=True, slots=True)
class StepCost:
    """Latency of a forward, in ms.

    knots: numbers of query tokens, rising. knot_ms: the latency there of one segment that reads no
    cache, never falling; straight lines between, and past the last at the last's slope.
    segment_ms: for every segment after the first. cached_ms: for 1,000 cached tokens read.
    Raises ValueError where the knots are no such line, or a latency is no finite number.
    """

    knots: tuple[int, ...]
    knot_ms: tuple[float, ...]
    segment_ms: float = 0.0
    cached_ms: float = 0.0

    def __post_init__(self) -> None:
        if not self.knots or len(self.knots) != len(self.knot_ms):
            raise ValueError(f"as many knots as latencies, and at least one: {self.knots}, {self.knot_ms}")
        if list(self.knots) != sorted(set(self.knots)) or list(self.knot_ms) != sorted(self.knot_ms):
            raise ValueError(f"knots must rise and latencies not fall: {self.knots}, {self.knot_ms}")
        if not all(map(math.isfinite, (*self.knot_ms, self.segment_ms, self.cached_ms))):
            raise ValueError("latencies must be finite")
        if self.knot_ms[0] <= 0 or self.segment_ms < 0 or self.cached_ms < 0:
            raise ValueError("latencies must be positive")

    def ms(self, num_tokens: float, num_segments: float = 1.0, num_cached: float = 0.0) -> float:
        """Of a forward of num_tokens query tokens in so many segments, reading num_cached in all."""
        more = self.segment_ms * max(0.0, num_segments - 1.0) + self.cached_ms * num_cached / 1000.0
        return self._line(num_tokens) + more

    def scaled(self, factor: float) -> "StepCost":
        """On a machine so many times slower."""
        knot_ms = tuple(ms * factor for ms in self.knot_ms)
        return StepCost(self.knots, knot_ms, self.segment_ms * factor, self.cached_ms * factor)

    def _line(self, num_tokens: float) -> float:
        knots, knot_ms = self.knots, self.knot_ms
        if num_tokens <= knots[0] or len(knots) == 1:
            return knot_ms[0]
        right = min(bisect_left(knots, num_tokens), len(knots) - 1)
        left = right - 1
        slope = (knot_ms[right] - knot_ms[left]) / (knots[right] - knots[left])
        return knot_ms[left] + slope * (num_tokens - knots[left])


UNMEASURED = StepCost(knots=(1, 32, 512), knot_ms=(10.0, 12.0, 80.0))
"""A machine nobody has measured: bound by memory up to some tens of tokens, then by arithmetic. Only
the shape bears on a choice of mode."""


@dataclass(frozen=True, slots=True)
class RoundYield:
    """What one round of a plan brings, on average.

    tokens: those that the request takes, so none past its end. forwards: a draft and its verify are
    two, a diffusion block's commit is one; one that begins the next block too is counted here alone.
    num_rounds: how many rounds the estimate rests on, an older one counting less; 0 is a prior.
    rows: query tokens a forward; None: the block's. Raises ValueError for what no round can bring.
    """

    plan: DecodePlan
    tokens: float
    forwards: float
    num_rounds: float = 0.0
    rows: float | None = None

    def __post_init__(self) -> None:
        brought = (self.tokens, self.forwards, 1.0 if self.rows is None else self.rows)
        if not all(0.0 < amount < math.inf for amount in brought):
            raise ValueError(f"tokens, forwards and rows must be positive and finite, got {brought}")
        if not 0.0 <= self.num_rounds < math.inf:
            raise ValueError(f"num_rounds must not be negative, got {self.num_rounds}")

    @property
    def rows_per_forward(self) -> float:
        return self.plan.block_length if self.rows is None else self.rows

    @property
    def tokens_per_forward(self) -> float:
        return self.tokens / self.forwards


def prior_yield(plan: DecodePlan) -> RoundYield:
    """What is expected of a plan that has never run."""
    block = plan.block_length
    if plan.mode is Mode.AR:
        return RoundYield(plan, 1.0, 1.0)
    if plan.mode is Mode.SELF_SPECULATION:
        return RoundYield(plan, (1.0 - PRIOR_ACCEPTANCE**block) / (1.0 - PRIOR_ACCEPTANCE), 2.0)
    fixed = min(1.0 + (PRIOR_FIXED - 1.0) * (1.0 - plan.threshold) / 0.1, 2.0 * PRIOR_FIXED)
    return RoundYield(plan, float(block), max(1.0, (block - 1) / fixed) + 1.0)


@dataclass(frozen=True, slots=True)
class ReplicaCosts:
    """What a replica has measured of itself.

    step: of a forward of any mode. yields: of plans that ran, or were inferred from others. own: of a
    forward, of modes that ran in force. Beside the same number of rows modes differ by what else the machine
    does meanwhile: tokens sent on their way, which `ar` has after every forward.
    """

    step: StepCost
    yields: tuple[RoundYield, ...] = ()
    own: Mapping[Mode, StepCost] = field(default_factory=dict)

    def step_of(self, mode: Mode) -> StepCost:
        """The mode's own, else what forwards of any mode take."""
        return self.own.get(mode, self.step)

    def yield_of(self, plan: DecodePlan) -> RoundYield:
        """Measured, else from the measured plan of that mode nearest to it, else a prior.

        From a near plan: its ratio to its own prior carries over, as does none of its certainty.
        """
        prior = prior_yield(plan)
        if plan.mode is Mode.AR:
            return prior
        near = _nearest(plan, self.yields)
        if near is None or near.plan == plan:
            return near or prior
        expected = prior_yield(near.plan)
        tokens = min(prior.tokens * near.tokens / expected.tokens, float(plan.block_length))
        forwards = max(1.0, prior.forwards * near.forwards / expected.forwards)
        rows = plan.block_length * near.rows_per_forward / near.plan.block_length
        return RoundYield(plan, max(1.0, tokens), forwards, rows=rows)


def _nearest(plan: DecodePlan, yields: Iterable[RoundYield]) -> RoundYield | None:
    def distance(entry: RoundYield) -> tuple[float, float]:
        low, high = sorted((entry.plan.block_length, plan.block_length))
        return abs(entry.plan.threshold - plan.threshold), high / low

    return min((entry for entry in yields if entry.plan.mode is plan.mode), key=distance, default=None)
