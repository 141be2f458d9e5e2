import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.cost import UNMEASURED, ForwardStats, ReplicaCosts, RoundStats, StepCost, prior_yield
from policies.cost_estimator import (
    REMEMBERED_S,
    CostEstimator,
    StepCostEstimator,
    YieldEstimator,
    fit_step_cost,
    knots_up_to,
)
from policies.modes import DecodePlan, Mode

TRUE = StepCost((1, 16, 128, 512), (3.0, 6.0, 20.0, 70.0), segment_ms=0.3, cached_ms=0.9)
KNOTS = knots_up_to(512)
SWEEP = [(q, 1, c) for c in (0, 256) for q in KNOTS]
SWEEP += [(n * b, n, 64 * n) for n in (4, 16, 64) for b in (1, 8) if n * b <= 512]
TYPICAL = [(1, 1, 100), (8, 1, 100), (8, 8, 800), (64, 8, 800), (256, 16, 1600), (500, 32, 3200)]
SPECULATION = {block: DecodePlan(Mode.SELF_SPECULATION, block) for block in (4, 8, 16, 32)}
DIFFUSION = DecodePlan(Mode.DIFFUSION, 16, 0.9)


def measured(shape, cost=TRUE, rng=None, noise=0.05, outliers=0.0):
    ms = cost.ms(*shape)
    if rng is not None:
        ms *= max(0.5, 1.0 + rng.gauss(0.0, noise))
        ms *= 5.0 if rng.random() < outliers else 1.0
    return ForwardStats(*shape, ms)


def worst_error(found, expected=TRUE, shapes=TYPICAL):
    return max(abs(found.ms(*shape) / expected.ms(*shape) - 1.0) for shape in shapes)


def test_knots_are_powers_of_two_up_to_the_longest_step():
    assert knots_up_to(512) == (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    assert knots_up_to(130)[-1] == 256
    assert knots_up_to(1) == (1,)


def test_a_sweep_without_noise_is_fitted():
    assert worst_error(fit_step_cost([measured(shape) for shape in SWEEP], KNOTS)) < 0.02


@pytest.mark.parametrize("seed", range(5))
def test_a_noisy_sweep_with_outliers_is_fitted(seed):
    rng = random.Random(seed)
    forwards = [measured(shape, rng=rng, outliers=0.1) for shape in SWEEP for _ in range(3)]
    assert worst_error(fit_step_cost(forwards, KNOTS)) < 0.15


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.builds(
            ForwardStats, st.integers(1, 512), st.integers(1, 64), st.integers(0, 9999), st.floats(0.01, 1e4)
        ),
        min_size=1,
        max_size=12,
    )
)
def test_whatever_was_measured_the_line_rises(forwards):
    cost = fit_step_cost(forwards, KNOTS)
    assert list(cost.knot_ms) == sorted(cost.knot_ms)
    StepCostEstimator(cost, 0.0).update(forwards, 1.0)


def test_nothing_measured_is_nothing_to_fit():
    with pytest.raises(ValueError, match="no forwards"):
        fit_step_cost([], KNOTS)


def learn(estimator, shapes, seconds, cost=TRUE, began_s=0.0, seed=0, outliers=0.0):
    """Ten forwards of these shapes a control period."""
    rng = random.Random(seed)
    for period in range(1, round(seconds / 0.2) + 1):
        forwards = [measured(rng.choice(shapes), cost, rng, outliers=outliers) for _ in range(10)]
        estimator.update(forwards, began_s + 0.2 * period)


@pytest.mark.parametrize("factor", [0.5, 2.0, 4.0])
def test_a_machine_that_changes_its_pace_is_followed_also_where_nothing_runs(factor):
    """All that runs are 8 sequences of one token; the others' cost changes along."""
    estimator = StepCostEstimator(TRUE, 0.0)
    learn(estimator, [(8, 8, 800)], 6.0, TRUE.scaled(factor))
    assert worst_error(estimator.cost, TRUE.scaled(factor), [(8, 8, 800)]) < 0.05
    assert worst_error(estimator.cost, TRUE.scaled(factor)) < 0.25


def test_outliers_move_nothing():
    estimator = StepCostEstimator(TRUE, 0.0)
    learn(estimator, TYPICAL, 20.0, outliers=0.15)
    assert worst_error(estimator.cost) < 0.12


def test_one_hang_of_many_forwards_passes():
    estimator = StepCostEstimator(TRUE, 0.0)
    estimator.update([ForwardStats(8, 8, 800, 5000.0)] * 3, 0.2)
    learn(estimator, [(8, 8, 800)], 3.0, began_s=0.2)
    assert worst_error(estimator.cost, shapes=[(8, 8, 800)]) < 0.05


@pytest.mark.parametrize("seed", range(20))
def test_slow_first_forwards_after_silences_leave_the_estimate_sane(seed):
    """Few requests, long silences, and a prefill after each that takes up to 12 times its time."""
    rng = random.Random(seed)
    estimator, now_s = StepCostEstimator(TRUE, 0.0), 0.0
    for _ in range(150):
        silence_s = rng.choice((0.2, 0.2, 0.2, 1.0, 5.0, 30.0))
        now_s += silence_s
        first = measured((rng.randrange(20, 60), 1, 0), TRUE, rng)
        if silence_s >= 5.0:
            first = first._replace(ms=first.ms * rng.uniform(1.0, 12.0))
        shape = (rng.choice((1, 16, 32)), 1, 60 + rng.randrange(40))
        estimator.update([first, *(measured(shape, TRUE, rng, outliers=0.05) for _ in range(8))], now_s)
        for shape in ((1, 1, 60), (16, 1, 60)):
            assert 1 / 3 < estimator.cost.ms(*shape) / TRUE.ms(*shape) < 3


@pytest.mark.parametrize("seed", range(3))
def test_a_bad_start_is_unlearned_from_what_runs_and_is_explored(seed):
    """A start-up sweep spoilt by a neighbour: everything costs the same."""
    wrong = StepCost(KNOTS, (12.0, 15.0, *[80.0] * (len(KNOTS) - 2)), cached_ms=50.0)
    estimator = StepCostEstimator(wrong, 0.0)
    explored = [(8, 8, 800), (64, 8, 800), (128, 8, 800)]
    learn(estimator, explored, 15.0, seed=seed)
    assert worst_error(estimator.cost, shapes=explored) < 0.15


def test_long_silence_leaves_the_estimate():
    estimator = StepCostEstimator(TRUE, 0.0)
    for second in range(1, 2000):
        estimator.update([], float(second))
    assert estimator.cost == TRUE
    learn(estimator, TYPICAL, 5.0, began_s=2000.0)
    assert worst_error(estimator.cost) < 0.12


def speculate(estimator, block, chance, num, now_s, seed=0):
    rng = random.Random(seed)
    rounds = []
    for _ in range(num):
        tokens = 1
        while tokens < block and rng.random() < chance:
            tokens += 1
        rounds.append(RoundStats(SPECULATION[block], tokens, 2, 2 * block))
    estimator.update(rounds, now_s)


def tokens_of(estimator, plan):
    return next(entry for entry in estimator.yields() if entry.plan == plan)


def test_before_any_round_nothing_is_said():
    assert YieldEstimator(0.0).yields() == ()


def test_self_speculation_is_counted_by_its_forwards_and_rows():
    """A round that verifies a whole draft, and now and then one without a draft: each is one forward."""
    estimator = YieldEstimator(0.0)
    plan = SPECULATION[16]
    estimator.update(
        [RoundStats(plan, 16, 1, 32), RoundStats(plan, 16, 1, 32), RoundStats(plan, 1, 1, 17)] * 80, 1.0
    )
    found = tokens_of(estimator, plan)
    assert found.tokens_per_forward == pytest.approx(11, rel=0.03)
    assert found.forwards == pytest.approx(1.0, abs=0.03)
    assert found.rows_per_forward == pytest.approx(27, abs=0.1)
    costs = ReplicaCosts(UNMEASURED, estimator.yields())
    assert costs.yield_of(SPECULATION[8]).forwards == pytest.approx(1.0, abs=0.03)


def test_diffusion_is_counted_by_block_and_near_its_prior_at_first():
    estimator = YieldEstimator(0.0)
    prior = prior_yield(DIFFUSION)
    estimator.update([RoundStats(DIFFUSION, 16, 3, 48)], 1.0)
    assert 3.0 < tokens_of(estimator, DIFFUSION).forwards < prior.forwards
    estimator.update([RoundStats(DIFFUSION, 12, 3, 48)] * 200, 2.0)
    found = tokens_of(estimator, DIFFUSION)
    assert (found.tokens, found.forwards) == (pytest.approx(12, rel=0.03), pytest.approx(3, rel=0.03))
    assert found.num_rounds == pytest.approx(200, rel=0.05)


def test_rows_a_forward_are_counted_where_forwards_begin_the_next_block_too():
    estimator = YieldEstimator(0.0)
    estimator.update([RoundStats(DIFFUSION, 16, 3, 64)] * 50, 1.0)
    assert tokens_of(estimator, DIFFUSION).rows_per_forward == pytest.approx(64 / 3, abs=0.01)
    costs = ReplicaCosts(UNMEASURED, estimator.yields())
    assert costs.yield_of(DecodePlan(Mode.DIFFUSION, 32, 0.9)).rows_per_forward == pytest.approx(
        128 / 3, abs=0.01
    )


def test_one_diffusion_block_lends_its_neighbours_what_it_learned():
    estimator = YieldEstimator(0.0)
    longer = DecodePlan(Mode.DIFFUSION, 32, 0.9)
    half = prior_yield(DIFFUSION).forwards / 2
    estimator.update(
        [RoundStats(DIFFUSION, 16, half, 16 * half)] * 100 + [RoundStats(longer, 32, 6, 192)], 1.0
    )
    assert tokens_of(estimator, longer).forwards < 0.6 * prior_yield(longer).forwards


def test_what_is_old_counts_less_and_is_forgotten():
    estimator = YieldEstimator(0.0)
    speculate(estimator, 8, 0.95, 100, 1.0)
    estimator.update([RoundStats(DIFFUSION, 16, 3, 48)] * 100, 1.0)
    estimator.update([], 61.0)
    assert tokens_of(estimator, SPECULATION[8]).num_rounds == pytest.approx(50, rel=0.02)
    assert tokens_of(estimator, DIFFUSION).num_rounds == pytest.approx(50, rel=0.02)
    estimator.update([], 3600.0)
    assert estimator.yields() == ()


def test_a_change_of_the_workload_is_followed_under_load():
    estimator = YieldEstimator(0.0)
    for period in range(100):
        speculate(estimator, 8, 0.98, 20, 0.2 * period, seed=period)
    for period in range(100, 200):
        speculate(estimator, 8, 0.6, 20, 0.2 * period, seed=period)
    assert tokens_of(estimator, SPECULATION[8]).tokens == pytest.approx((1 - 0.6**8) / 0.4, rel=0.1)


SLOWED = 3.0


def forwards_of(mode, num_tokens, ms, num=20, is_exploration=False):
    return [ForwardStats(num_tokens, 8, 400, ms, mode, is_exploration)] * num


def run_for(estimator, mode, num_tokens, ms, began_s, seconds):
    for period in range(int(5 * seconds)):
        estimator.update(forwards_of(mode, num_tokens, ms), began_s + 0.2 * period)


def test_what_a_mode_costs_is_remembered_while_another_runs():
    """`ar` sends tokens after every forward, which slows its forwards; drafts are as fast as expected."""
    start = StepCost((1, 8, 64, 512), (1.0, 2.0, 6.0, 40.0))
    estimator = CostEstimator(start, 0.0)
    run_for(estimator, Mode.AR, 8, SLOWED * start.ms(8, 8, 400), 0.2, 5)
    learned = estimator.own[Mode.AR].ms(8, 8, 400)
    assert learned == pytest.approx(SLOWED * start.ms(8, 8, 400), rel=0.05)
    run_for(estimator, Mode.SELF_SPECULATION, 128, start.ms(128, 8, 400), 6.0, 30)
    estimator.update(forwards_of(Mode.AR, 8, start.ms(8, 8, 400), is_exploration=True), 36.0)
    assert estimator.own[Mode.AR].ms(8, 8, 400) == learned
    assert estimator.own[Mode.SELF_SPECULATION].ms(128, 8, 400) == pytest.approx(
        start.ms(128, 8, 400), rel=0.05
    )


def test_a_mode_that_has_not_run_for_long_is_known_by_its_exploration():
    start = StepCost((1, 8, 64, 512), (1.0, 2.0, 6.0, 40.0))
    estimator = CostEstimator(start, 0.0)
    run_for(estimator, Mode.AR, 8, SLOWED * start.ms(8, 8, 400), 0.2, 5)
    for period in range(20):
        now_s = 5.0 + REMEMBERED_S + 1.0 + 0.2 * period
        estimator.update(forwards_of(Mode.AR, 8, start.ms(8, 8, 400), 1, is_exploration=True), now_s)
    assert estimator.own[Mode.AR].ms(8, 8, 400) == pytest.approx(start.ms(8, 8, 400), rel=0.1)


def test_a_mode_that_only_was_explored_has_no_costs_of_its_own():
    estimator = CostEstimator(UNMEASURED, 0.0)
    estimator.update(forwards_of(Mode.AR, 8, 5.0, is_exploration=True), 1.0)
    estimator.update(forwards_of(None, 64, 5.0), 1.2)
    assert estimator.own == {}
    assert ReplicaCosts(estimator.cost, (), estimator.own).step_of(Mode.AR) == estimator.cost
