import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.cost import ForwardStats, StepCost
from policies.cost_fit import fit_step_cost, knots_up_to

TRUE = StepCost((1, 16, 128, 512), (3.0, 6.0, 20.0, 70.0), segment_ms=0.3, cached_ms=0.9)
KNOTS = knots_up_to(512)
SWEEP = [(q, 1, c) for c in (0, 256) for q in KNOTS]
SWEEP += [(n * b, n, 64 * n) for n in (4, 16, 64) for b in (1, 8) if n * b <= 512]
TYPICAL = [(1, 1, 100), (8, 1, 100), (8, 8, 800), (64, 8, 800), (256, 16, 1600), (500, 32, 3200)]


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


def test_nothing_measured_is_nothing_to_fit():
    with pytest.raises(ValueError, match="no forwards"):
        fit_step_cost([], KNOTS)
