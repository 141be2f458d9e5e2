from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.cost import UNMEASURED, ReplicaCosts, RoundYield, StepCost
from policies.forecast import forecast
from policies.modes import DecodePlan, Mode, default_plan
from policies.policy import Snapshot
from policies.registry import create_policy
from policies.scaling import FULL, SPARE, Targets, demand, wanted_replicas
from tests.policies.helpers import a_load

AR = DecodePlan(Mode.AR)
SPECULATION = DecodePlan(Mode.SELF_SPECULATION, 8)
STEP = StepCost((1, 101), (10.0, 60.0))  # 10 ms, and half a ms for every token after the first
COSTS = ReplicaCosts(STEP, (RoundYield(SPECULATION, 6.0, 2.0, 50),))


def a_replica(num_in_flight, **changes):
    values = {"costs": COSTS, "max_running": 64, "num_pages": 4096, "num_waiting": 0, "mean_remaining": 50.0}
    return a_load(num_in_flight, **{**values, "num_running": num_in_flight, **changes})


def in_ar(load):
    return AR


def test_the_room_is_where_the_pace_would_miss_its_target():
    """21 requests in AR take 20 ms a token."""
    asked = demand(a_replica(7), in_ar, Targets(tpot_s=0.020))
    assert (asked.capacity, asked.headroom) == (21, 14)
    assert asked.share == pytest.approx(7 / 21)
    assert demand(a_replica(0), in_ar, Targets(tpot_s=0.020)).capacity == 21
    assert demand(a_replica(30), in_ar, Targets(tpot_s=0.020)).share == pytest.approx(30 / 21)


def test_the_plan_is_the_one_that_so_many_would_run():
    """Speculation keeps 10 ms a token up to 5 requests (29.5 ms a forward of 3 tokens), AR only one."""

    def by_load(load):
        return SPECULATION if load.num_in_flight <= 4 else AR

    assert demand(a_replica(1), by_load, Targets(tpot_s=0.0101)).capacity == 4
    assert demand(a_replica(1), in_ar, Targets(tpot_s=0.0101)).capacity == 1


def test_the_room_is_of_requests_at_once_however_long_clients_take_between_two():
    load = replace(a_replica(2), mean_completion=50.0)
    slow = replace(load, num_between=6, turnaround_s=0.4)
    targets = Targets(tpot_s=0.020)
    assert demand(slow, in_ar, targets).capacity == demand(load, in_ar, targets).capacity == 21


def test_places_and_pages_bound_the_room():
    assert demand(a_replica(2, max_running=8), in_ar, Targets(tpot_s=9.0)).capacity == 8
    few = a_replica(2, num_pages=64, page_size=16, mean_context=255.0)
    assert demand(few, in_ar, Targets(tpot_s=9.0)).capacity == 4


def test_a_pace_that_one_request_alone_would_miss_asks_for_nothing():
    """More replicas would not help it: the places are the room."""
    assert demand(a_replica(3), in_ar, Targets(tpot_s=0.005)).capacity == 64
    mixed = a_replica(4, num_auto=2, pinned_by_mode={Mode.AR: 2})
    slow_ar = demand(mixed, lambda load: SPECULATION, Targets(tpot_s=0.006))
    assert slow_ar.capacity > 1


def test_what_waits_asks_for_more_by_how_late_it_would_be():
    """8 places at 8 / 13.5 ms: 16 that wait need 16 x 50 tokens of others to end first, in 1.35 s."""
    full = a_replica(24, num_running=8, num_waiting=16, max_running=8)
    late = demand(full, in_ar, Targets(ttft_s=0.5, tpot_s=9.0))
    assert late.ttft_s == pytest.approx(1.35 + 0.0135, rel=0.01)
    assert late.share == pytest.approx(max(3.0, 1.35 / 0.49), rel=0.02)
    assert demand(full, in_ar, Targets(ttft_s=0.2, tpot_s=9.0)).share == pytest.approx(1.35 / 0.19, rel=0.03)
    prompts = a_replica(2, num_running=1, num_waiting=1, waiting_prompt_tokens=5110)
    assert demand(prompts, in_ar, Targets(ttft_s=0.05, tpot_s=9.0)).share > 2.0
    assert demand(prompts, in_ar, Targets(ttft_s=60.0, tpot_s=9.0)).share < 0.1


@pytest.mark.parametrize(
    ("shares", "num_running", "num_wanted", "wanted"),
    [
        ([0.7], 1, 1, 1),
        ([0.9], 1, 1, 2),  # not yet missed
        ([0.9, 0.9, 0.9], 3, 3, 4),
        ([9.0], 1, 1, 2),  # doubled at most
        ([9.0, 9.0], 2, 3, 4),
        ([1.5], 1, 2, 2),  # one is on its way already
        ([3.0], 1, 4, 4),
        ([0.5, 0.5], 2, 2, 2),  # one would be full at once
        ([0.3, 0.2], 2, 2, 1),
        ([0.0, 0.0, 0.0], 3, 3, 1),
        ([0.1], 2, 2, 2),  # one says nothing
        ([0.9, 0.9], 3, 3, 3),
        ([], 0, 2, 2),
    ],
)
def test_so_many_replicas_are_wanted(shares, num_running, num_wanted, wanted):
    assert wanted_replicas(shares, num_running, num_wanted) == wanted


@given(
    total=st.floats(0.0, 50.0),
    noise=st.floats(-0.1, 0.1),
    num=st.integers(1, 40),
)
def test_a_load_that_wavers_is_not_followed_up_and_down(total, noise, num):
    """Where a load asks for more, a tenth less of it does not take that back."""
    settled = wanted_replicas([total / num] * num, num, num)
    if settled == num:
        return
    again = wanted_replicas([total * (1 + noise) / settled] * settled, settled, settled)
    assert (again - settled) * (settled - num) >= 0


@given(shares=st.lists(st.floats(0.0, 3.0), min_size=1, max_size=20))
def test_nobody_is_sent_away_where_the_rest_would_be_full(shares):
    num = len(shares)
    wanted = wanted_replicas(shares, num, num)
    assert 1 <= wanted <= 2 * num
    if wanted < num:
        assert sum(shares) / wanted <= SPARE + 1e-9
    if wanted == num:
        assert sum(shares) / num <= FULL + 1e-9


def test_every_policy_can_be_asked_what_so_many_would_run():
    for name in ("cost_model", "slo", "threshold", "fixed"):
        policy = create_policy(name, {})

        def plan_at(load, policy=policy):
            return policy.decide(Snapshot(load), policy.resume(None, 0.0, 0.0), 0.0)[0].decode

        asked = demand(a_replica(5, pinned_by_mode={Mode.AR: 1}, num_auto=4), plan_at, Targets())
        assert asked.capacity >= 1
        assert default_plan(plan_at(a_replica(1)).mode)


@pytest.mark.parametrize("policy_name", ["threshold", "cost_model", "slo"])
def test_the_room_ends_before_the_first_number_that_misses_whatever_more_would_do(policy_name):
    """A policy may take a faster mode for a few requests more; 2 that are slow are no 3 that are not."""
    policy = create_policy(policy_name)

    def plan_at(load):
        return policy.decide(Snapshot(load), policy.resume(None, 0, 0), 0.0)[0].decode

    load = a_load(8, max_running=40, num_pages=10_000, costs=ReplicaCosts(UNMEASURED), mean_remaining=64.0)
    paces_s = []
    for num in range(1, 41):
        there = replace(load, num_running=num, num_auto=num, num_waiting=0)
        paces_s.append(forecast(there, plan_at(there)).tpot_s)
    for target_s in [*paces_s, *(number / 4000 for number in range(4, 80))]:
        if paces_s[0] <= target_s:
            first_miss = next((n for n, pace_s in enumerate(paces_s) if pace_s > target_s), 40)
            assert demand(load, plan_at, Targets(tpot_s=target_s)).capacity == first_miss
    if policy_name == "threshold":
        assert paces_s != sorted(paces_s), "else a search by halves would do"


@pytest.mark.parametrize("most", [100, 1000, 100_000])
def test_the_forecasts_asked_for_are_few_however_many_places_there_are(most):
    num_asked = 0

    def counted(load):
        nonlocal num_asked
        num_asked += 1
        return AR

    load = a_replica(3, max_running=most, num_pages=10**9)
    assert demand(load, counted, Targets(tpot_s=9e9)).capacity == most
    assert num_asked < 160
    # 0.5 ms a request more, from 10 ms: the room is exact where the plan does not change with it.
    found = demand(replace(load, max_step_tokens=10**6), counted, Targets(tpot_s=0.0500001)).capacity
    assert found == min(most, 81)
