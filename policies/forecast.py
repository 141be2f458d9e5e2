"""The forecast of a plan at a replica: goodput and pace, from the load and the measured costs.

All sequences share each forward, whatever their modes: with n_g sequences of group g that have B_g query
tokens each, a forward takes L(sum n_g B_g + prefill, segments, cached tokens read) and brings
sum n_g y_g / F_g tokens (policies.cost has L, y, F and B: the block, or more where forwards begin the next
one too).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from policies.cost import UNMEASURED, ReplicaCosts, RoundYield
from policies.modes import DecodePlan, default_plan, lossless_plan
from policies.replica_load import ReplicaLoad

PREFILL_SHARE = 0.25
"""The share of a step's tokens that is kept free of rounds while prompts wait (replicas.engine.scheduler)."""

_NOTHING_MEASURED = ReplicaCosts(UNMEASURED)


@dataclass(frozen=True, slots=True)
class Forecast:
    """The goodput and pace expected at a replica under a plan."""

    plan: DecodePlan
    """The plan of the `auto` requests."""
    tokens_per_s: float
    """Tokens a second of all requests at the replica, pinned ones too."""
    step_ms: float
    """The latency of a forward."""
    num_prefill: float
    """Prompt tokens in a forward."""
    spread: float
    """The standard deviation of the log of tokens_per_s against that of what runs now, as far as a trial can
    tell."""
    tpots: tuple[tuple[float, float], ...]
    """The number of requests in each group that decodes alike, and the seconds a token that each of them
    takes while it runs; the first group is the one that follows the plan."""

    @property
    def tpot_s(self) -> float:
        """The seconds a token of a request that follows the plan."""
        return self.tpots[0][1]


def forecast(load: ReplicaLoad, plan: DecodePlan, num_auto: float | None = None) -> Forecast:
    """Forecasts a replica with its `auto` requests on this plan.

    An idle replica is judged by the one request that may come next. Requests that places or pages
    can't hold wait, blocks that the tokens of a step can't hold take turns.
    num_auto: the number of `auto` requests; None for the load's.
    """
    costs = load.costs or _NOTHING_MEASURED
    asked = _groups(load, plan, load.num_auto if num_auto is None else num_auto)
    groups = [(count, costs.yield_of(group)) for count, group in asked]
    num_requests = sum(count for count, _ in groups)
    held_tokens = sum(count * (load.mean_context + group.rows_per_forward) for count, group in groups)
    pool_tokens = load.num_pages * load.page_size
    places = min(1.0, load.max_running / num_requests, pool_tokens / max(1.0, held_tokens))
    num_tokens = places * sum(count * group.rows_per_forward for count, group in groups)
    unbounded = places * sum(count * _pace(load, group) for count, group in groups)
    turns = _turns(load, num_tokens, unbounded)
    num_tokens *= turns

    paces = [(count, turns * _pace(load, group)) for count, group in groups]
    made = turns * unbounded
    num_prefill = min(load.prefill_per_token * made, load.max_step_tokens - num_tokens)
    num_segments = places * turns * num_requests
    _, most = max(groups, key=lambda entry: entry[0])
    factor, spread = costs.factor(most.plan.mode, num_tokens + num_prefill)
    num_cached = num_segments * load.mean_context
    step_ms = factor * costs.step.ms(num_tokens + num_prefill, num_segments, num_cached)
    tpots = tuple((count, step_ms / pace / 1000.0) for count, pace in paces)
    tokens_per_s = costs.rate_factor(most.plan.mode, num_requests) * 1000.0 * made / step_ms
    spread = math.hypot(spread, most.spread)
    return Forecast(plan, tokens_per_s, step_ms, num_prefill, spread, tpots)


def _turns(load: ReplicaLoad, num_tokens: float, made: float) -> float:
    """Returns the share of a forward's blocks that its tokens have room for, beside the prompts.

    num_tokens, made: of a forward with all of them. Prompts keep their share only while any wait, the less
    often the fewer there are: on average they take what they need of it.
    """
    most = min(1.0, load.max_step_tokens / num_tokens)
    num_prefill = min(load.prefill_per_token * made * most, PREFILL_SHARE * load.max_step_tokens)
    return min(1.0, (load.max_step_tokens - num_prefill) / num_tokens)


def _groups(load: ReplicaLoad, plan: DecodePlan, num_auto: float) -> Iterator[tuple[float, DecodePlan]]:
    """Yields the number of requests on each plan; never none at all."""
    num_pinned = sum(load.pinned_by_mode.values())
    num_auto = max(num_auto, 0.0 if num_pinned else 1.0)
    num_lossless = min(load.num_lossless, num_auto)
    yield num_auto - num_lossless, plan
    if num_lossless:
        yield num_lossless, lossless_plan(plan, load.modes)
    for mode, count in load.pinned_by_mode.items():
        yield count, default_plan(mode)


def _pace(load: ReplicaLoad, expected: RoundYield) -> float:
    """Returns the tokens a forward brings to a request: a round no more than a whole completion has.

    By what running requests still want it would fall as they near their ends, and rise when the next begin.
    """
    most = math.inf if load.mean_completion is None else max(1.0, load.mean_completion)
    return min(expected.tokens, most) / expected.forwards
