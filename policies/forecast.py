"""The forecast of a plan at a replica: goodput and pace, from the load and the measured costs.

All sequences share each forward, whatever their modes: with n_g sequences of group g that have B_g query
tokens each, a forward takes L(sum n_g B_g + prefill, segments, cached tokens read) and brings
sum n_g C / (1 + F_g (C - 1) / y_g) tokens (policies.cost has L, y, F and B: the block, or more where forwards
begin the next one too). C is the length of a completion: its first token comes with its prompt, whose forward
counts the more the fewer forwards the rest takes. n_g are those of the requests that are in flight: clients
come back after a while, and are the oftener between two requests the sooner they have their answers.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from policies.cost import UNMEASURED, ReplicaCosts, RoundYield
from policies.modes import DecodePlan, default_plan, lossless_plan
from policies.replica_load import ReplicaLoad

PREFILL_SHARE = 0.25
"""The share of a step's tokens that is kept free of rounds while prompts wait (replicas.engine.scheduler)."""

NUM_ITERATIONS = 8
"""Iterations for the share of clients that wait: each leaves of its error at most the rest's share."""

_NOTHING_MEASURED = ReplicaCosts(UNMEASURED)


@dataclass(frozen=True, slots=True)
class Forecast:
    """The goodput and pace expected at a replica under a plan."""

    plan: DecodePlan
    """The plan of the `auto` requests."""
    tokens_per_s: float
    """Tokens a second of all requests at the replica, pinned ones too."""
    awaited_tokens_per_s: float
    """Tokens a second if no client took any time between two requests, each as fast as it is: what plans are
    compared by, since none shortens that time and all shorten the wait."""
    step_ms: float
    """The latency of a forward."""
    round_s: float
    """The time in which every request that follows the plan has a forward."""
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


@dataclass(frozen=True, slots=True)
class _Group:
    """Clients whose requests decode alike."""

    num_clients: float
    expected: RoundYield
    pace: float
    """Tokens that a forward of a round brings to a request."""
    made: float
    """Tokens that a forward brings to it on average, from its prompt's on."""


def forecast(load: ReplicaLoad, plan: DecodePlan, num_auto: float | None = None) -> Forecast:
    """Forecasts a replica with its `auto` requests on this plan.

    An idle replica is judged by the one request that may come next. Requests that places or pages
    can't hold wait, blocks that the tokens of a step can't hold take turns.
    num_auto: the number of clients with `auto` requests; None for the load's.
    """
    costs = load.costs or _NOTHING_MEASURED
    groups = _groups(load, plan, costs, load.num_auto_clients if num_auto is None else num_auto)
    num_clients = sum(group.num_clients for group in groups)
    asks_s = load.turnaround_s / (num_clients * (load.mean_completion or math.inf))
    share, expected = 1.0, _served(load, plan, costs, groups, num_clients)
    for _ in range(NUM_ITERATIONS if asks_s else 0):
        made = expected.tokens_per_s * min(1.0, share * num_clients)
        share /= share + asks_s * made
        expected = _served(load, plan, costs, groups, max(1.0, share * num_clients))
    most = max(groups, key=lambda group: group.num_clients).expected.plan.mode
    made = costs.rate_factor(most, num_clients) * expected.tokens_per_s * min(1.0, share * num_clients)
    return replace(expected, tokens_per_s=made, awaited_tokens_per_s=made / share)


def _served(
    load: ReplicaLoad, plan: DecodePlan, costs: ReplicaCosts, groups: Sequence[_Group], num_requests: float
) -> Forecast:
    """Forecasts a replica while so many requests are in flight, of each group its part."""
    num_clients = sum(group.num_clients for group in groups)
    counts = [group.num_clients * num_requests / num_clients for group in groups]
    each = list(zip(counts, groups, strict=True))
    rows = sum(count * group.expected.rows_per_forward for count, group in each)
    held_tokens = num_requests * load.mean_context + rows
    pool_tokens = load.num_pages * load.page_size
    places = min(1.0, load.max_running / num_requests, pool_tokens / max(1.0, held_tokens))
    unbounded = places * sum(count * group.made for count, group in each)
    turns = _turns(load, places * rows, unbounded)
    num_tokens = turns * places * rows

    made = turns * unbounded
    num_prefill = min(load.prefill_per_token * made, load.max_step_tokens - num_tokens)
    num_segments = places * turns * num_requests
    most = max(groups, key=lambda group: group.num_clients).expected
    factor, spread = costs.factor(most.plan.mode, num_tokens + num_prefill)
    num_cached = num_segments * load.mean_context
    step_ms = factor * costs.step.ms(num_tokens + num_prefill, num_segments, num_cached)
    tpots = tuple((count, step_ms / (turns * group.pace) / 1000.0) for count, group in each)
    tokens_per_s = 1000.0 * made / step_ms
    spread = math.hypot(spread, most.spread)
    round_s = step_ms / (1000.0 * max(turns * places, 1e-9))
    return Forecast(plan, tokens_per_s, tokens_per_s, step_ms, round_s, num_prefill, spread, tpots)


def _turns(load: ReplicaLoad, num_tokens: float, made: float) -> float:
    """Returns the share of a forward's blocks that its tokens have room for, beside the prompts.

    num_tokens, made: of a forward with all of them. Prompts keep their share only while any wait, the less
    often the fewer there are: on average they take what they need of it.
    """
    most = min(1.0, load.max_step_tokens / num_tokens)
    num_prefill = min(load.prefill_per_token * made * most, PREFILL_SHARE * load.max_step_tokens)
    return min(1.0, (load.max_step_tokens - num_prefill) / num_tokens)


def _groups(load: ReplicaLoad, plan: DecodePlan, costs: ReplicaCosts, num_auto: float) -> list[_Group]:
    """Returns the clients on each plan; never none at all."""
    found = []
    for num_clients, of_plan in _counts(load, plan, num_auto):
        expected = costs.yield_of(of_plan)
        pace = _pace(load, expected)
        found.append(_Group(num_clients, expected, pace, _with_prompt(load, pace)))
    return found


def _counts(load: ReplicaLoad, plan: DecodePlan, num_auto: float) -> Iterator[tuple[float, DecodePlan]]:
    pinned = {mode: count * load.clients_per_request for mode, count in load.pinned_by_mode.items()}
    num_auto = max(num_auto, 0.0 if any(pinned.values()) else 1.0)
    num_lossless = min(load.num_lossless * load.clients_per_request, num_auto)
    yield num_auto - num_lossless, plan
    if num_lossless:
        yield num_lossless, lossless_plan(plan, load.modes)
    for mode, num_clients in pinned.items():
        yield num_clients, default_plan(mode, load.risk)


def _pace(load: ReplicaLoad, expected: RoundYield) -> float:
    """Returns the tokens a forward brings to a request: a round no more than a completion's but its first.

    By what running requests still want it would fall as they near their ends, and rise when the next begin.
    """
    most = math.inf if load.mean_completion is None else max(1.0, load.mean_completion - 1.0)
    return min(expected.tokens, most) / expected.forwards


def _with_prompt(load: ReplicaLoad, pace: float) -> float:
    """Returns the tokens a forward brings to a request from its prompt on, which has a forward or more of its
    own and brings the first token."""
    if load.mean_completion is None:
        return pace
    length = max(1.0, load.mean_completion)
    num_prompt = max(1.0, length * load.prefill_per_token / load.max_step_tokens)
    return length / (num_prompt + (length - 1.0) / pace)
