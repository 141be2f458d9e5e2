import random

import pytest

from policies.cost import UNKNOWN_SPREAD, ForwardStats, ReplicaCosts, StepCost
from policies.cost_estimator import CostEstimator
from policies.cost_fit import knots_up_to
from policies.modes import Mode

KNOTS = knots_up_to(512)
SHAPE = StepCost(KNOTS, tuple(2.0 + 0.1 * knot for knot in KNOTS), segment_ms=0.1, cached_ms=0.5)
ALONE = {Mode.AR: (8, 8, 800), Mode.SELF_SPECULATION: (128, 8, 800), Mode.DIFFUSION: (256, 8, 800)}


def forwards_of(mode, factor=1.0, num=10, rng=None, noise=0.1, shape=None):
    """Forwards of 8 requests in a mode, factor times the shape's latency."""
    shape = shape or ALONE[mode]
    return [
        ForwardStats(
            *shape, SHAPE.ms(*shape) * factor * (1.0 if rng is None else max(0.5, rng.gauss(1, noise))), mode
        )
        for _ in range(num)
    ]


def run_for(estimator, seconds, modes, pace=1.0, began_s=0.0, factors=None, seed=0):
    """The modes take turns of 0.4 s."""
    rng = random.Random(seed)
    for period in range(1, round(seconds / 0.2) + 1):
        mode = modes[(period // 2) % len(modes)]
        batch = forwards_of(mode, pace * (factors or {}).get(mode, 1.0), rng=rng)
        estimator.update(batch, began_s + 0.2 * period)


def expected_ms(estimator, mode, shape=None):
    shape = shape or ALONE[mode]
    costs = ReplicaCosts(estimator.cost, (), estimator.factors)
    return costs.factor(mode, shape[0])[0] * costs.step.ms(*shape)


def ratio(estimator, one=Mode.SELF_SPECULATION, other=Mode.AR):
    """How the cost of one mode to the other's has come to differ from the shape's."""
    found = expected_ms(estimator, one) / expected_ms(estimator, other)
    return found / (SHAPE.ms(*ALONE[one]) / SHAPE.ms(*ALONE[other]))


@pytest.mark.parametrize("factor", [0.5, 2.0, 4.0])
def test_a_machine_that_changes_its_pace_is_followed_for_all_modes(factor):
    estimator = CostEstimator(SHAPE, 0.0)
    run_for(estimator, 3.0, [Mode.AR])
    run_for(estimator, 1.0, [Mode.AR], pace=factor, began_s=3.0)
    assert expected_ms(estimator, Mode.AR) == pytest.approx(factor * SHAPE.ms(*ALONE[Mode.AR]), rel=0.1)
    assert ratio(estimator) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("slow_s", [2.0, 4.0, 8.0])
def test_a_slowdown_while_one_mode_runs_is_not_booked_on_it(slow_s):
    estimator = CostEstimator(SHAPE, 0.0)
    run_for(estimator, 5.0, [Mode.SELF_SPECULATION, Mode.AR])
    run_for(estimator, 10.0, [Mode.AR], began_s=5.0)
    run_for(estimator, slow_s, [Mode.AR], pace=4.0, began_s=15.0)
    assert ratio(estimator) == pytest.approx(1.0, abs=0.1)
    run_for(estimator, 2.0, [Mode.AR], began_s=15.0 + slow_s)
    assert ratio(estimator) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("seed", range(3))
def test_what_a_mode_costs_beside_the_shape_is_learned_from_pairs(seed):
    """`ar` sends tokens after each forward. The pace changes all the while."""
    rng = random.Random(seed)
    estimator, pace = CostEstimator(SHAPE, 0.0), 1.0
    for period in range(100):
        pace *= 1.0 + rng.gauss(0.0, 0.05)
        mode = Mode.AR if period % 10 < 2 else Mode.SELF_SPECULATION
        factor = 1.5 if mode is Mode.AR else 1.0
        estimator.update(forwards_of(mode, pace * factor, rng=rng), 0.2 * period)
    assert ratio(estimator) == pytest.approx(1 / 1.5, rel=0.12)


def test_what_was_learned_holds_while_another_mode_runs_and_grows_less_sure():
    estimator = CostEstimator(SHAPE, 0.0)
    run_for(estimator, 6.0, [Mode.AR, Mode.SELF_SPECULATION], factors={Mode.AR: 1.5})
    run_for(estimator, 1.0, [Mode.SELF_SPECULATION], began_s=6.0)
    sure = estimator.factors[Mode.AR].at(8)[1]
    run_for(estimator, 60.0, [Mode.SELF_SPECULATION], began_s=7.0)
    assert ratio(estimator) == pytest.approx(1 / 1.5, rel=0.15)
    assert sure < estimator.factors[Mode.AR].at(8)[1] < UNKNOWN_SPREAD
    estimator.update([], 200_000.0)
    assert ratio(estimator) == pytest.approx(1.0, abs=0.01)


def test_what_runs_is_the_reference_of_all_spreads():
    estimator = CostEstimator(SHAPE, 0.0)
    run_for(estimator, 10.0, [Mode.AR])
    assert estimator.factors[Mode.AR].at(8)[1] < 0.05
    assert estimator.factors[Mode.AR].at(512)[1] > 0.1
    assert set(estimator.factors) == {Mode.AR}
    assert ReplicaCosts(SHAPE, (), estimator.factors).factor(Mode.DIFFUSION, 8) == (1.0, UNKNOWN_SPREAD)


def test_a_shape_that_errs_at_few_rows_is_mended_there_alone():
    """One row takes twice what the sweep found, 64 as much, which one factor for `ar` could not say.

    `ar` is tried for 0.4 s in every 30; there is one client for a minute, then 64."""
    estimator, block = CostEstimator(SHAPE, 0.0), (64, 1, 100)
    shapes = {2.0: (1, 1, 100), 1.0: (64, 64, 6400)}
    for period in range(1, 1200):
        factor = 2.0 if period // 300 % 2 == 0 else 1.0
        if period % 150 < 2:
            estimator.update(forwards_of(Mode.AR, factor, shape=shapes[factor]), 0.2 * period)
        else:
            estimator.update(forwards_of(Mode.SELF_SPECULATION, shape=block), 0.2 * period)
    for factor, shape in shapes.items():
        assert expected_ms(estimator, Mode.AR, shape) == pytest.approx(factor * SHAPE.ms(*shape), rel=0.15)


def test_one_hang_of_many_forwards_passes():
    estimator = CostEstimator(SHAPE, 0.0)
    run_for(estimator, 5.0, [Mode.AR, Mode.SELF_SPECULATION])
    estimator.update(forwards_of(Mode.AR, 500.0, num=3), 5.2)
    run_for(estimator, 1.0, [Mode.AR], began_s=5.2)
    assert expected_ms(estimator, Mode.AR) == pytest.approx(SHAPE.ms(*ALONE[Mode.AR]), rel=0.1)
    assert ratio(estimator) == pytest.approx(1.0, abs=0.1)


def test_prompts_and_mixtures_tell_of_no_mode():
    estimator = CostEstimator(SHAPE, 0.0)
    estimator.update([ForwardStats(64, 1, 0, 500.0)] * 20, 0.2)
    assert (estimator.cost, estimator.factors) == (SHAPE, {})


def test_what_was_known_before_a_restart_is_known_after_it():
    before = CostEstimator(SHAPE, 0.0)
    run_for(before, 10.0, [Mode.AR, Mode.SELF_SPECULATION], factors={Mode.AR: 1.5})
    after = CostEstimator(SHAPE, 5000.0, before.factors)
    assert ratio(after) == pytest.approx(ratio(before), rel=0.03)
    assert after.factors[Mode.AR].at(8)[1] < UNKNOWN_SPREAD
    shorter = StepCost(KNOTS[:5], SHAPE.knot_ms[:5])
    assert len(CostEstimator(shorter, 0.0, before.factors).factors[Mode.AR].logs) == 5


def test_small_forwards_beside_large_ones_do_not_make_few_rows_dear():
    """They run where a request has just ended: what works on that slows them, not their number of rows."""
    small, large = (32, 2, 200), (128, 8, 800)
    mode = Mode.SELF_SPECULATION
    estimator = CostEstimator(SHAPE, 0.0)
    for period in range(1, 100):
        batch = forwards_of(mode, 2.0, num=2, shape=small) + forwards_of(mode, num=8, shape=large)
        estimator.update(batch, 0.2 * period)
    factors = estimator.factors[mode]
    assert factors.at(32)[0] / factors.at(128)[0] == pytest.approx(1.0, abs=0.1)
