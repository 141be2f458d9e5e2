"""The costs and yields of decoding at one replica: the figures that a decision by cost is made from.

A forward of q query tokens takes L(q, ...) milliseconds (`StepCost`), times its mode's factor
(`ModeFactors`); a round of a plan takes F of them and brings y tokens (`RoundYield`). With C sequences in
a plan of block B the replica makes C x y / (F x L(C x B)) tokens a second; policies.forecast has the whole
formula.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from policies.modes import DecodePlan, Mode

PRIOR_ACCEPTANCE = 0.9
"""The chance that the next drafted token agrees, before any is measured. 0.9 gives 5.7, 8.1 and 9.7 tokens
a verified block of 8, 16 and 32, where Nemotron-Labs-Diffusion-8B was measured at 5.8, 8.5 and 11.4."""
MAX_LOG = 50.0
"""The largest logarithm of a factor that is one, either way."""
PRIOR_SPREAD = 0.7
"""The standard deviation of the log of a yield before any round was seen: 2 either way."""
PRIOR_FIXED = 2.7
"""The positions that a denoising forward fixes at threshold 0.9, before any is measured: the 8B's 2.57
tokens a forward (arXiv 2607.05722) at block 32, its commit left out."""
DOUBT_EXPONENT = 0.25
"""The power of the doubt, one less the threshold, with which grows what is fixed beyond the surest position:
as triad-5m's tokens a forward do from threshold 0.99 to 0.9 (docs/experiments/diffusion.md)."""
FACTOR_SHARE = 0.1
"""The doubt of a threshold that fixes about as much as a factor does, over the factor: triad-5m decodes alike
with the factor 0.1 and the threshold 0.99, and with 0.5 and 0.95."""
RISK_SHARE = 2.0
"""The same over the risk of a learned sampler: triad-5m has as many tokens a forward with the risk 0.01 as
with the factor 0.2."""


class ForwardStats(NamedTuple):
    """One forward as measured."""

    num_tokens: int
    """Query tokens."""
    num_segments: int
    num_cached: int
    """Cached tokens that the forward read, over all segments."""
    ms: float
    """The time from its step's begin to the next one's, or to the silence after it."""
    mode: Mode | None = None
    """The mode of nearly all of the forward's decoding tokens, None for prompts alone and for mixtures."""


class RoundStats(NamedTuple):
    """One round as it went."""

    plan: DecodePlan
    """The plan as asked for."""
    tokens: int
    """Tokens that the request took."""
    forwards: int
    rows: int
    """Query tokens in these forwards."""
    is_clients: bool = False
    """True if the request itself set the plan's parameters or bounded its forwards, or has diffusion in a
    form, under penalties or with log-probabilities: no policy may choose such a plan."""


@dataclass(frozen=True, slots=True)
class StepCost:
    """The latency of a forward, in ms, by its query tokens, segments and cached tokens.

    Raises ValueError where the knots are no such line as below, or a latency is no finite number.
    """

    knots: tuple[int, ...]
    """Numbers of query tokens, rising."""
    knot_ms: tuple[float, ...]
    """The latency at each knot of one segment that reads no cache, never falling; in straight lines between
    the knots, and past the last at the last line's slope."""
    segment_ms: float = 0.0
    """The latency of every segment after the first."""
    cached_ms: float = 0.0
    """The latency of 1,000 cached tokens read."""

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
        """Returns the latency of num_tokens query tokens in num_segments that read num_cached in all."""
        more = self.segment_ms * max(0.0, num_segments - 1.0) + self.cached_ms * num_cached / 1000.0
        return self._line(num_tokens) + more

    def scaled(self, factor: float) -> "StepCost":
        """Returns the cost on a machine `factor` times slower."""
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


UNKNOWN_SPREAD = 0.3
"""The standard deviation of the log of a mode's factor that nothing is known of: 35 % either way."""


def octave_weights(num_tokens: float, num_octaves: int) -> dict[int, float]:
    """Returns the octaves next to a number of query tokens, with weights that sum to 1.

    Octave n stands for 2^n query tokens; between two, the logarithm of the number decides.
    """
    place = min(max(0.0, math.log2(max(1.0, num_tokens))), num_octaves - 1.0)
    low = min(int(place), max(0, num_octaves - 2))
    weights = {low: 1.0 - (place - low), low + 1: place - low}
    return {octave: weight for octave, weight in weights.items() if weight > 0.0}


@dataclass(frozen=True, slots=True)
class ModeFactors:
    """The factors between a mode's forwards and the shape of all, by octaves of query tokens.

    Raises ValueError for tuples of unequal lengths, or a number that is none.
    """

    logs: tuple[float, ...]
    """The logarithm of the factor at 2^n query tokens, by n."""
    spreads: tuple[float, ...]
    """The standard deviation of that logarithm against the one of what runs now."""

    def __post_init__(self) -> None:
        if not self.logs or len(self.logs) != len(self.spreads):
            raise ValueError(f"as many factors as spreads, and at least one: {self.logs}, {self.spreads}")
        if not all(-MAX_LOG <= log <= MAX_LOG for log in self.logs):
            raise ValueError(f"factors must be finite: {self.logs}")
        if not all(0.0 <= spread <= MAX_LOG for spread in self.spreads):
            raise ValueError(f"spreads must be finite and not negative: {self.spreads}")

    def at(self, num_tokens: float) -> tuple[float, float]:
        """Returns the factor for a number of query tokens, and the spread of its logarithm."""
        weights = octave_weights(num_tokens, len(self.logs))
        log = sum(weight * self.logs[octave] for octave, weight in weights.items())
        return math.exp(log), sum(weight * self.spreads[octave] for octave, weight in weights.items())


UNMEASURED = StepCost(knots=(1, 32, 512), knot_ms=(10.0, 12.0, 80.0))
"""The cost assumed of a machine nobody has measured: bound by memory up to some tens of tokens, then by
arithmetic. Only the shape bears on a choice of mode."""


@dataclass(frozen=True, slots=True)
class RoundYield:
    """The yield of one round of a plan, on average. Raises ValueError for one that no round can have."""

    plan: DecodePlan
    tokens: float
    """Tokens that the request takes, so none past its end."""
    forwards: float
    """Forwards: a round of self-speculation is one, as is a diffusion block's commit; a forward that begins
    the next draft or block too is counted in this round alone."""
    num_rounds: float = 0.0
    """The number of rounds that the estimate rests on, an older one counting less; 0 is a prior."""
    rows: float | None = None
    """Query tokens a forward; None for the block's."""
    differing: float | None = None
    """The share of answers that differ from `ar`'s in any token, measured of the checkpoint beforehand; None
    where it was not."""
    right: float | None = None
    """The share of right answers, measured with it."""

    def __post_init__(self) -> None:
        rows = 1.0 if self.rows is None else self.rows
        if not (0.0 < self.tokens < math.inf and 0.0 < self.forwards < math.inf and 0.0 < rows < math.inf):
            brought = (self.tokens, self.forwards, self.rows)
            raise ValueError(f"tokens, forwards and rows must be positive and finite, got {brought}")
        if not 0.0 <= self.num_rounds < math.inf:
            raise ValueError(f"num_rounds must not be negative, got {self.num_rounds}")
        if not all(share is None or 0.0 <= share <= 1.0 for share in (self.differing, self.right)):
            raise ValueError(f"shares of answers must be 0 to 1, got {self.differing} and {self.right}")

    @property
    def rows_per_forward(self) -> float:
        return self.plan.block_length if self.rows is None else self.rows

    @property
    def tokens_per_forward(self) -> float:
        return self.tokens / self.forwards

    @property
    def spread(self) -> float:
        """The standard deviation of the log of tokens_per_forward; `ar`'s is never in doubt."""
        return 0.0 if self.plan.mode is Mode.AR else PRIOR_SPREAD / math.sqrt(1.0 + self.num_rounds)


@lru_cache(maxsize=1024)
def prior_yield(plan: DecodePlan) -> RoundYield:
    """Returns the yield expected of a plan that has never run."""
    block = plan.block_length
    if plan.mode is Mode.AR:
        return RoundYield(plan, 1.0, 1.0)
    if plan.mode is Mode.SELF_SPECULATION:
        verified = (1.0 - PRIOR_ACCEPTANCE**block) / (1.0 - PRIOR_ACCEPTANCE)
        return speculation_round(plan, verified, 1.0 - PRIOR_ACCEPTANCE ** (block - 1))
    fixed = 1.0 + (PRIOR_FIXED - 1.0) * (_doubt(plan) / 0.1) ** DOUBT_EXPONENT
    return RoundYield(plan, float(block), max(1.0, (block - 1) / fixed) + 1.0)


def _doubt(plan: DecodePlan) -> float:
    """Returns the doubt at which diffusion fixes a position: one less its threshold; 0 for other modes."""
    if plan.risk is not None:
        return RISK_SHARE * plan.risk
    if plan.factor is not None:
        return FACTOR_SHARE * plan.factor
    return 0.0 if plan.threshold is None else 1.0 - plan.threshold


def speculation_round(plan: DecodePlan, verified: float, refused: float) -> RoundYield:
    """Returns the mean of rounds that verify a draft and of those without one, one after each refusal.

    verified: tokens that a round with a draft brings. refused: the chance that not all of one is accepted.
    """
    block = plan.block_length
    without = refused / (1.0 + refused)  # the share of rounds without a draft: a token of the seed's row
    tokens = without + (1.0 - without) * verified
    return RoundYield(plan, tokens, 1.0, rows=without * (1 + block) + (1.0 - without) * 2 * block)


@dataclass(frozen=True, slots=True)
class ReplicaCosts:
    """The costs and yields that a replica has measured of itself."""

    step: StepCost
    """The shape of a forward's cost at the machine's present pace."""
    yields: tuple[RoundYield, ...] = ()
    """The yields of plans that ran, were inferred from others, or were known at the start."""
    factors: Mapping[Mode, ModeFactors] = field(default_factory=dict)
    """The factors of the modes that have run: for the same number of rows modes differ by what else the
    machine does meanwhile, as sending tokens, which `ar` does after every forward."""
    left_out: float = 0.0
    """The logarithm of the rate made over the rate foretold, as far as all plans have it in common."""
    rates: Mapping[Mode, ModeFactors] = field(default_factory=dict)
    """The further factors of modes between these rates, by octaves of clients."""

    def __post_init__(self) -> None:
        if not -MAX_LOG <= self.left_out <= MAX_LOG:
            raise ValueError(f"left_out must be finite, got {self.left_out}")

    def rate_factor(self, mode: Mode, num_requests: float) -> float:
        """Returns the rate to expect of a mode over the one that step costs and yields foretell."""
        rates = self.rates.get(mode)
        return math.exp(self.left_out) * (1.0 if rates is None else rates.at(num_requests)[0])

    def factor(self, mode: Mode, num_tokens: float) -> tuple[float, float]:
        """Returns a mode's factor on the step cost, and the spread of its logarithm."""
        factors = self.factors.get(mode)
        return (1.0, UNKNOWN_SPREAD) if factors is None else factors.at(num_tokens)

    def yield_of(self, plan: DecodePlan) -> RoundYield:
        """Returns a plan's measured yield, else one from the nearest measured plan of its mode, else a prior.

        A near plan's ratio to its own prior carries over, none of its certainty does.
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
        rows = prior.rows_per_forward * near.rows_per_forward / expected.rows_per_forward
        return RoundYield(plan, max(1.0, tokens), forwards, rows=rows)


def _bound(plan: DecodePlan) -> tuple[bool, bool]:
    """Returns the kind of a plan's bound: whether it is a threshold, and whether it is a factor."""
    return plan.threshold is not None, plan.factor is not None


def _nearest(plan: DecodePlan, yields: Iterable[RoundYield]) -> RoundYield | None:
    def distance(entry: RoundYield) -> tuple[bool, float, float]:
        low, high = sorted((entry.plan.block_length, plan.block_length))
        return _bound(entry.plan) != _bound(plan), abs(_doubt(entry.plan) - _doubt(plan)), high / low

    return min((entry for entry in yields if entry.plan.mode is plan.mode), key=distance, default=None)
