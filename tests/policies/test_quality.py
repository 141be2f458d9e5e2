"""Quality as a bound: whatever was measured, nothing runs that does not keep it, and something always can."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from policies.cost import ReplicaCosts, RoundYield, StepCost
from policies.cost_model import CostModelParameters, CostModelPolicy
from policies.modes import LOSSLESS_MODES, DecodePlan, Mode
from policies.policy import Snapshot
from policies.quality import QualityBound, bounded_plan, plans_within
from policies.slo import SloParameters, SloPolicy
from tests.policies.helpers import a_load
from tests.thorough import examples

STEP = StepCost((1, 64, 512), (7.0, 8.0, 60.0))
BLOCKS = (8, 16, 32)

shares = st.none() | st.sampled_from([0.0, 0.005, 0.01, 0.02, 1.0]) | st.floats(0.0, 1.0)
bounds = st.sampled_from([0.005, 0.01, 1.0]) | st.floats(0.0, 1.0, exclude_min=True)
plans = st.one_of(
    st.just(DecodePlan(Mode.AR)),
    st.builds(DecodePlan, st.just(Mode.SELF_SPECULATION), st.sampled_from(BLOCKS)),
    st.builds(DecodePlan, st.just(Mode.DIFFUSION), st.sampled_from(BLOCKS), st.sampled_from([0.5, 0.9])),
    st.builds(
        DecodePlan, st.just(Mode.DIFFUSION), st.sampled_from(BLOCKS), factor=st.sampled_from([0.05, 0.1, 9.0])
    ),
    st.builds(
        DecodePlan, st.just(Mode.DIFFUSION), st.sampled_from(BLOCKS), risk=st.sampled_from([0.02, 0.5])
    ),
)
yields = st.lists(
    st.builds(
        RoundYield,
        plans,
        st.floats(1.0, 64.0),
        st.floats(1.0, 32.0),
        st.floats(0.0, 500.0),
        differing=shares,
    ),
    max_size=12,
    unique_by=lambda entry: entry.plan,
)
modes = st.sets(st.sampled_from([Mode.DIFFUSION, Mode.SELF_SPECULATION])).map(lambda some: (Mode.AR, *some))


def keeps(plan: DecodePlan, max_differing: float, known: list[RoundYield]) -> bool:
    measured = {entry.plan: entry.differing for entry in known}
    differing = measured.get(plan)
    return plan.mode in LOSSLESS_MODES or (differing is not None and differing <= max_differing)


@given(yields, bounds, modes, st.integers(0, 60))
@examples(300)
def test_a_policy_considers_and_runs_only_what_keeps_the_bound(known, max_differing, has, num):
    costs = ReplicaCosts(STEP, tuple(known))
    load = a_load(num, modes=has, costs=costs)
    for policy_class, parameters in ((CostModelPolicy, CostModelParameters), (SloPolicy, SloParameters)):
        bound = parameters(quality={"max_differing": max_differing}, diffusion_gain=0.0)
        policy = policy_class(bound)
        decided = policy.decide(Snapshot(load), (), 0.0)[0].decode
        tried = policy.trial(load, decided)
        considered = bound.candidates(has, costs)
        assert decided in considered
        assert tried is None or tried.plan in considered
        assert all(plan.mode in has and keeps(plan, max_differing, known) for plan in considered)


@given(yields, bounds, modes)
@examples(300)
def test_what_keeps_the_bound_is_considered_at_every_block_that_has_any(known, max_differing, has):
    costs = ReplicaCosts(STEP, tuple(known))
    bounded = CostModelParameters(quality=QualityBound(max_differing=max_differing))
    plans = bounded.candidates(has, costs)
    lossless = CostModelParameters(quality="lossless").candidates(has, costs)
    assert plans[: len(lossless)] == lossless
    blocks = {
        entry.plan.block_length
        for entry in known
        if entry.plan.mode is Mode.DIFFUSION and keeps(entry.plan, max_differing, known)
    }
    expected = sorted(blocks) if Mode.DIFFUSION in has else []
    assert [plan.block_length for plan in plans[len(lossless) :]] == expected


@given(yields, st.tuples(bounds, bounds).map(sorted), modes, plans)
@examples(300)
def test_a_request_runs_the_plan_where_that_keeps_its_bound_else_what_does(known, pair, has, plan):
    stricter, looser = pair
    for max_differing in pair:
        kept = plans_within(max_differing, known)
        run = bounded_plan(plan, kept, has)
        assert run.mode in has
        assert keeps(run, max_differing, known)
        if plan.mode in has and keeps(plan, max_differing, known):
            assert run == plan
        if plan.mode is Mode.DIFFUSION and run.mode is Mode.DIFFUSION:
            assert run.block_length <= plan.block_length
    assert set(plans_within(stricter, known)) <= set(plans_within(looser, known))


def measured(block, differing, tokens=8.0, **setting):
    plan = DecodePlan(Mode.DIFFUSION, block, **setting)
    return RoundYield(plan, tokens, 1.0, 500.0, differing=differing)


KNOWN = (
    measured(8, 0.002, 6.0, factor=0.05),
    measured(8, 0.01, 7.0, factor=0.1),
    measured(16, 0.009, 11.0, factor=0.05),
    measured(16, 0.03, 13.0, threshold=0.9),
    measured(32, 0.012, 15.0, factor=0.05),
    measured(32, None, 30.0, factor=1.0),
)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"quality": {"max_differing": 0.001}}, []),
        ({"quality": {"max_differing": 0.01}}, [(8, None, 0.1), (16, None, 0.05)]),
        ({"quality": {"max_differing": 0.05}}, [(8, None, 0.1), (16, 0.9, None), (32, None, 0.05)]),
        ({"quality": {"max_differing": 0.05}, "diffusion_blocks": [8]}, [(8, None, 0.1)]),
        ({"quality": {"max_differing": 0.01}, "factor": 0.05}, [(8, None, 0.05), (16, None, 0.05)]),
        ({"quality": {"max_differing": 0.05}, "threshold": 0.9}, [(16, 0.9, None)]),
        ({"quality": "lossless"}, []),
        ({"quality": "any"}, [(8, None, 0.1), (16, None, 0.1), (32, None, 0.1)]),
    ],
)
def test_of_each_block_the_quickest_setting_that_keeps_the_bound_is_considered(parameters, expected):
    plans = CostModelParameters(**parameters).candidates(tuple(Mode), ReplicaCosts(STEP, KNOWN))
    found = [(p.block_length, p.threshold, p.factor) for p in plans if p.mode is Mode.DIFFUSION]
    assert found == expected


def test_where_nothing_is_known_a_bound_means_lossless():
    bounded = CostModelParameters(quality={"max_differing": 1.0})
    assert bounded.candidates(tuple(Mode)) == CostModelParameters(quality="lossless").candidates(tuple(Mode))


def test_the_fastest_plan_within_the_bound_is_chosen():
    """Diffusion brings far more than self-speculation here, the more the looser."""
    load = a_load(1, costs=ReplicaCosts(STEP, KNOWN))
    chosen = []
    for quality in (0.001, 0.005, 0.01, 0.05):
        policy = CostModelPolicy(CostModelParameters(quality={"max_differing": quality}))
        chosen.append(policy.decide(Snapshot(load), (), 0.0)[0].decode)
    assert chosen[0].mode is Mode.SELF_SPECULATION
    assert chosen[1:] == [KNOWN[0].plan, KNOWN[2].plan, KNOWN[4].plan]


@pytest.mark.parametrize("value", [0.0, -0.1, 1.1, math.nan, math.inf, "0.5", True, None])
def test_a_bound_that_is_none_is_refused(value):
    with pytest.raises(ValidationError):
        CostModelParameters(quality={"max_differing": value})
