import pickle
import random
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.control.codec import LOADS
from policies.cost import PRIOR_ACCEPTANCE, ReplicaCosts, RoundYield, StepCost, prior_yield
from policies.modes import MAX_BLOCK_LENGTH, DecodePlan, Mode
from tests.policies.helpers import a_load

STEP = StepCost((1, 16, 128), (3.0, 6.0, 20.0), segment_ms=0.25, cached_ms=0.5)
SPECULATION = DecodePlan(Mode.SELF_SPECULATION, 8)
plans = st.one_of(
    st.just(DecodePlan(Mode.AR)),
    st.builds(
        DecodePlan,
        st.sampled_from([Mode.DIFFUSION, Mode.SELF_SPECULATION]),
        st.integers(2, MAX_BLOCK_LENGTH),
        st.floats(0.1, 1.0),
    ),
)


@pytest.mark.parametrize(
    ("num_tokens", "expected"), [(0, 3.0), (1, 3.0), (8.5, 4.5), (16, 6.0), (72, 13.0), (240, 34.0)]
)
def test_latency_is_a_line_through_the_knots_and_goes_on_past_the_last(num_tokens, expected):
    assert STEP.ms(num_tokens) == pytest.approx(expected)


def test_segments_and_cached_tokens_cost_extra():
    assert STEP.ms(16, 5, 3000) == pytest.approx(6.0 + 4 * 0.25 + 3 * 0.5)
    assert STEP.scaled(2.0).ms(16, 5, 3000) == pytest.approx(2 * STEP.ms(16, 5, 3000))
    assert StepCost((4,), (2.0,)).ms(500) == 2.0


@pytest.mark.parametrize(
    "wrong",
    [
        ((), ()),
        ((1, 2), (1.0,)),
        ((2, 1), (1.0, 2.0)),
        ((1, 1), (1.0, 2.0)),
        ((1, 2), (2.0, 1.0)),
        ((1,), (0.0,)),
    ],
)
def test_knots_that_are_no_rising_line_are_refused(wrong):
    with pytest.raises(ValueError, match=r"knots|latencies"):
        StepCost(*wrong)


@given(plans)
def test_priors_are_possible(plan):
    expected = prior_yield(plan)
    assert 1.0 <= expected.tokens <= plan.block_length
    assert expected.forwards >= 1.0


def test_priors_are_near_the_published_figures():
    """Accepted tokens a verified block of the 8B at 8, 16, 32, and tokens a forward of its diffusion."""
    for block, measured in ((8, 5.777), (16, 8.533), (32, 11.359)):
        verified = sum(PRIOR_ACCEPTANCE**place for place in range(block))
        assert verified == pytest.approx(measured, rel=0.16)
    diffusion = prior_yield(DecodePlan(Mode.DIFFUSION, 32, 0.9))
    assert diffusion.tokens_per_forward == pytest.approx(2.57, rel=0.02)


@pytest.mark.parametrize("block", [2, 8, 32])
def test_the_prior_of_self_speculation_is_what_a_chain_of_rounds_brings(block):
    """A draft accepted whole has the next one behind it; after a refusal a round has none."""
    rng = random.Random(block)
    tokens = rows = 0
    has_draft = False
    for _ in range(20_000):
        num_accepted = 0
        while has_draft and num_accepted < block - 1 and rng.random() < PRIOR_ACCEPTANCE:
            num_accepted += 1
        tokens += num_accepted + 1
        rows += 2 * block if has_draft else 1 + block
        has_draft = num_accepted == block - 1 if has_draft else True
    expected = prior_yield(DecodePlan(Mode.SELF_SPECULATION, block))
    assert expected.forwards == 1.0
    assert expected.tokens == pytest.approx(tokens / 20_000, rel=0.03)
    assert expected.rows_per_forward == pytest.approx(rows / 20_000, rel=0.03)


def test_a_longer_block_brings_more_a_round_and_a_lower_threshold_costs_fewer_forwards():
    by_block = [prior_yield(DecodePlan(Mode.SELF_SPECULATION, block)).tokens for block in (2, 4, 8, 16, 32)]
    assert all(short < long for short, long in pairwise(by_block))
    by_threshold = [prior_yield(DecodePlan(Mode.DIFFUSION, 16, t)).forwards for t in (1.0, 0.9, 0.8)]
    assert all(sure > quick for sure, quick in pairwise(by_threshold))


def test_a_measured_yield_counts_and_carries_over_to_the_nearest_block():
    measured = RoundYield(SPECULATION, tokens=6.9, forwards=2.0, num_rounds=40)
    far = RoundYield(DecodePlan(Mode.SELF_SPECULATION, 64), tokens=9.0, forwards=2.0, num_rounds=5)
    costs = ReplicaCosts(STEP, (far, measured))
    assert costs.yield_of(SPECULATION) is measured
    longer = costs.yield_of(DecodePlan(Mode.SELF_SPECULATION, 16))
    ratio = measured.tokens / prior_yield(SPECULATION).tokens
    assert longer.tokens == pytest.approx(ratio * prior_yield(longer.plan).tokens)
    assert longer.num_rounds == 0
    diffusion = DecodePlan(Mode.DIFFUSION, 16)
    assert costs.yield_of(diffusion) == prior_yield(diffusion)


def test_yields_of_one_kind_of_bound_carry_over_to_it_before_others():
    def measured(**bound):
        return RoundYield(DecodePlan(Mode.DIFFUSION, 16, **bound), 16.0, 2.0, num_rounds=40)

    every = (measured(threshold=0.97), measured(factor=0.3), measured(risk=0.02))
    for near, other in zip(every, ({"threshold": 0.9}, {"factor": 0.1}, {"risk": 0.04}), strict=True):
        costs = ReplicaCosts(STEP, tuple(replace(e, forwards=2.0 if e is near else 9.0) for e in every))
        plan = DecodePlan(Mode.DIFFUSION, 16, **other)
        expected = prior_yield(plan).forwards * 2.0 / prior_yield(near.plan).forwards
        assert costs.yield_of(plan).forwards == pytest.approx(max(1.0, expected))


@given(plans, st.floats(1.0, 16.0), st.floats(1.0, 20.0))
def test_what_carries_over_stays_possible(plan, tokens, forwards):
    measured = RoundYield(DecodePlan(Mode.DIFFUSION, 16, 0.9), tokens, forwards, 3)
    carried = ReplicaCosts(STEP, (measured,)).yield_of(plan)
    assert 1.0 <= carried.tokens <= MAX_BLOCK_LENGTH
    assert carried.forwards >= 1.0


def test_costs_survive_pickle_and_the_store():
    load = a_load(2, costs=ReplicaCosts(STEP, (RoundYield(SPECULATION, 6.9, 2.0, 40.5),)))
    assert pickle.loads(pickle.dumps(load)) == load
    assert LOADS.decode(LOADS.encode(load)) == load
