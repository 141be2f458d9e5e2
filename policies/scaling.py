"""The number of replicas a load asks for: more before requests miss their targets, fewer once that is safe.

A replica has room for as many requests at once as are all expected to get their tokens at the target's
pace, under the plans that its policy would choose for so many, by the costs it has measured. Its demand
is the larger of two shares: of the requests there in that room, and of the expected wait in the wait that
the target for the first token allows. Summed over the replicas it is the number of full ones asked for.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from policies.forecast import Forecast, forecast
from policies.modes import DecodePlan
from policies.replica_load import ReplicaLoad
from policies.slo import ttft_s

FULL = 0.8
"""The demand a replica above which more replicas are asked for: a miss is foreseen, not awaited."""
SPARE = 0.6
"""The demand a replica up to which fewer replicas are enough, so that the next request asks for no more."""
MAX_GROWTH = 2.0
"""The largest factor on the replicas that run, at once: a backlog says more of the past than of the load."""

MAX_STEPS = 64
"""The number of requests up to which the pace is forecast for every number."""

DEMAND = "triad_demand"
"""The name under which a replica reports its Demand.share."""

PlanAt = Callable[[ReplicaLoad], DecodePlan]
"""A pure function that returns the plan a replica would run at a load."""


@dataclass(frozen=True, slots=True)
class Targets:
    """The targets of a request."""

    ttft_s: float = 1.0
    """Seconds to the first token."""
    tpot_s: float = 0.05
    """Seconds of each token after the first."""


@dataclass(frozen=True, slots=True)
class Demand:
    """The requests at one replica against those that it could take."""

    share: float
    """The demand as a share of a whole replica; above 1 a target is expected to be missed."""
    capacity: int
    """Requests at once that are expected to keep the pace."""
    num_in_flight: int
    """Requests running or waiting."""
    num_waiting: int
    waiting_prompt_tokens: int
    ttft_s: float
    """The expected time to the first token of the last request that waits, or of the next to come."""

    @property
    def headroom(self) -> int:
        """The number of further requests that would be served in time; below 0 that many are too many."""
        return self.capacity - self.num_in_flight

    def report(self) -> dict[str, float]:
        """Returns the demand by name, as Serve's autoscaler takes it."""
        return {
            DEMAND: self.share,
            "triad_headroom": float(self.headroom),
            "triad_waiting": float(self.num_waiting),
            "triad_waiting_prompt_tokens": float(self.waiting_prompt_tokens),
            "triad_expected_ttft_s": self.ttft_s,
        }


def demand(load: ReplicaLoad, plan_at: PlanAt, targets: Targets) -> Demand:
    """Returns a replica's demand.

    A miss that more replicas can't help is no demand: a pace that one request misses, a prompt's own time.
    """
    capacity = _capacity(load, plan_at, targets.tpot_s)
    expected = ttft_s(load, forecast(load, plan_at(load)))
    alone = _with_requests(load, 1)
    alone_s = ttft_s(alone, forecast(alone, plan_at(alone)))
    allowed_s = targets.ttft_s - alone_s if alone_s < targets.ttft_s else targets.ttft_s
    queued = max(0.0, expected - alone_s) / allowed_s if load.num_waiting else 0.0
    return Demand(
        share=max(load.num_in_flight / capacity, queued),
        capacity=capacity,
        num_in_flight=load.num_in_flight,
        num_waiting=load.num_waiting,
        waiting_prompt_tokens=load.waiting_prompt_tokens,
        ttft_s=expected,
    )


def wanted_replicas(shares: Sequence[float], num_running: int, num_wanted: int) -> int:
    """Returns the number of replicas there should be.

    shares: the demand at each replica that reports it, of num_running that run. num_wanted: the number
    asked for so far, which stays between FULL and SPARE, and where fewer might do but some replica is silent.
    """
    total = sum(shares)
    needed = math.ceil(total / FULL)
    if needed > num_wanted:
        return max(num_wanted, min(needed, math.floor(MAX_GROWTH * num_running)))
    if not shares or len(shares) < num_running:
        return num_wanted
    return min(num_wanted, max(1, math.ceil(total / SPARE)))


def _capacity(load: ReplicaLoad, plan_at: PlanAt, tpot_s: float) -> int:
    """Returns the number of requests, like those there, that keep the pace at once; at least one."""

    def expected(num: int) -> Forecast:
        there = _with_requests(load, num)
        return forecast(there, plan_at(there))

    in_time_alone = [count > 0 and pace_s <= tpot_s for count, pace_s in expected(1).tpots]

    def is_too_many(num: int) -> bool:
        paces = (pace_s for _, pace_s in expected(num).tpots)
        return any(kept and pace_s > tpot_s for kept, pace_s in zip(in_time_alone, paces, strict=True))

    return max(1, _last_before(is_too_many, _places(load)))


def _last_before(is_too_many: Callable[[int], bool], most: int) -> int:
    """Returns the number before the first, from 1 to most, that is too many.

    A number larger than one that is too many may be fine, since the plan changes with it: a policy may take
    another mode for a few requests more, and be faster. So all up to MAX_STEPS are asked. Beyond, to ask no
    more than twice as many, only numbers at even ratios are, and between two of them is_too_many is taken
    to change once.
    """
    num, ratio = 0, max(1.0, most / MAX_STEPS) ** (1.0 / MAX_STEPS)
    while num < most:
        following = min(most, max(num + 1, math.floor(num * ratio) if num >= MAX_STEPS else num + 1))
        if is_too_many(following):
            between = range(num + 1, following)
            return num + bisect_left(between, True, key=is_too_many)
        num = following
    return most


def _places(load: ReplicaLoad) -> int:
    """Returns the number of requests that can run at once, by the replica's bound and its pages."""
    if not load.mean_context:
        return max(1, load.max_running)
    by_pages = load.num_pages * load.page_size / (load.mean_context + 1.0)
    return max(1, min(load.max_running, int(by_pages)))


def _with_requests(load: ReplicaLoad, num: int) -> ReplicaLoad:
    """Returns the load with num requests running and none waiting, each kind in its part, rounded up."""

    def part(count: int) -> int:
        return math.ceil(count * num / load.num_in_flight) if load.num_in_flight else 0

    return replace(
        load,
        num_running=num,
        num_waiting=0,
        num_between=0,
        turnaround_s=0.0,
        waiting_prompt_tokens=0,
        num_auto=part(load.num_auto) if load.num_in_flight else num,
        num_lossless=part(load.num_lossless),
        pinned_by_mode={mode: part(count) for mode, count in load.pinned_by_mode.items()},
    )
