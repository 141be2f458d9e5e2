import random

import pytest

from policies.cost import UNMEASURED, ReplicaCosts, RoundStats, RoundYield, prior_yield
from policies.modes import DecodePlan, Mode
from policies.yield_estimator import KNOWN_ROUNDS, YieldEstimator

SPECULATION = {block: DecodePlan(Mode.SELF_SPECULATION, block) for block in (4, 8, 16, 32)}
DIFFUSION = DecodePlan(Mode.DIFFUSION, 16)


def speculate(estimator, block, chance, num, now_s, seed=0):
    rng = random.Random(seed)
    rounds = []
    for _ in range(num):
        tokens = 1
        while tokens < block and rng.random() < chance:
            tokens += 1
        rounds.append(RoundStats(SPECULATION[block], tokens, 1, 2 * block))
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


def test_a_block_that_never_ran_is_inferred_from_the_nearest_by_its_ratio_to_the_prior():
    estimator = YieldEstimator(0.0)
    speculate(estimator, 16, 0.5, 200, 1.0)
    near = tokens_of(estimator, SPECULATION[16])
    inferred = ReplicaCosts(UNMEASURED, estimator.yields()).yield_of(SPECULATION[8])
    ratio = near.tokens / prior_yield(SPECULATION[16]).tokens
    assert inferred.tokens == pytest.approx(ratio * prior_yield(SPECULATION[8]).tokens)
    assert (inferred.forwards, inferred.num_rounds) == (1.0, 0.0)
    assert 9 < inferred.rows_per_forward <= 18


def test_what_clients_chose_themselves_is_not_counted():
    estimator = YieldEstimator(0.0)
    estimator.update([RoundStats(SPECULATION[8], 8, 1, 16, is_clients=True)] * 50, 1.0)
    assert estimator.yields() == ()


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
    assert costs.yield_of(DecodePlan(Mode.DIFFUSION, 32)).rows_per_forward == pytest.approx(128 / 3, abs=0.01)


def test_one_diffusion_block_lends_its_neighbours_what_it_learned():
    estimator = YieldEstimator(0.0)
    longer = DecodePlan(Mode.DIFFUSION, 32)
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


def known(chance, blocks=(4, 8, 16, 32)):
    return [
        RoundYield(SPECULATION[b], (1 - chance**b) / (1 - chance), 1.0, 500, rows=2.0 * b) for b in blocks
    ]


def test_what_is_known_at_the_start_is_said_before_any_round():
    entry = RoundYield(DIFFUSION, 15.0, 2.5, 400, rows=24.0)
    estimator = YieldEstimator(0.0, [*known(0.9), entry])
    for block, plan in SPECULATION.items():
        assert tokens_of(estimator, plan).tokens == pytest.approx((1 - 0.9**block) / 0.1, rel=0.001)
        assert tokens_of(estimator, plan).rows == 2 * block
    found = tokens_of(estimator, DIFFUSION)
    assert (found.tokens, found.forwards, found.rows) == (15.0, 2.5, 24.0)
    assert found.num_rounds == KNOWN_ROUNDS


def test_what_is_known_of_answers_is_said_however_the_rounds_go():
    estimator = YieldEstimator(0.0, [RoundYield(DIFFUSION, 15.0, 2.5, 400, 24.0, differing=0.01, right=0.98)])
    other = DecodePlan(Mode.DIFFUSION, 16, 0.5)
    for now_s in (1.0, 7200.0):
        estimator.update([RoundStats(plan, 16, 3, 48) for plan in (DIFFUSION, other)] * 100, now_s)
        assert (tokens_of(estimator, DIFFUSION).differing, tokens_of(estimator, DIFFUSION).right) == (
            0.01,
            0.98,
        )
        assert (tokens_of(estimator, other).differing, tokens_of(estimator, other).right) == (None, None)


def test_a_workload_unlike_the_known_one_is_learned_soon():
    estimator = YieldEstimator(0.0, [*known(0.95), RoundYield(DIFFUSION, 16.0, 2.0, 400, rows=24.0)])
    for period in range(50):  # 10 s
        speculate(estimator, 16, 0.6, 10, 0.2 * period, seed=period)
    assert tokens_of(estimator, SPECULATION[16]).tokens == pytest.approx(2.5, rel=0.15)
    estimator.update([RoundStats(DIFFUSION, 10, 5, 80)] * 100, 10.2)
    assert tokens_of(estimator, DIFFUSION).forwards == pytest.approx(5, rel=0.1)


def test_long_after_the_last_round_it_is_as_at_the_start():
    estimator = YieldEstimator(0.0, known(0.9))
    speculate(estimator, 16, 0.5, 200, 1.0)
    estimator.update([], 7200.0)
    assert tokens_of(estimator, SPECULATION[16]).tokens == pytest.approx((1 - 0.9**16) / 0.1, rel=0.02)
