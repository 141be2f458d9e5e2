"""The filter against brute force, and what it must do with surprises and with age."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.factors import DriftingFactors, Prior

PACE = Prior(1.0, 20.0)
OWN = Prior(0.3, 600.0)
NOISE = 0.05


def two(now_s: float = 0.0) -> DriftingFactors[str]:
    factors = DriftingFactors("pace", PACE, now_s)
    factors.add("a", OWN)
    factors.add("b", OWN)
    return factors


def apart(factors: DriftingFactors[str]) -> tuple[float, float]:
    """How much dearer b is than a, and how sure that is."""
    values, spreads = factors.estimates([{"a": 1.0}, {"b": 1.0}], {"a": 1.0})
    return float(values[1] - values[0]), float(spreads[1])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.floats(-0.02, 0.02)), min_size=1, max_size=8))
def test_small_errors_are_learned_as_by_the_normal_equations(seen):
    """At one moment the filter is a linear regression with a prior."""
    factors = two()
    precision = np.diag([PACE.spread**-2, OWN.spread**-2, OWN.spread**-2])
    vector = np.zeros(3)
    for name, value in seen:
        row = np.array([1.0, name == "a", name == "b"])
        precision += np.outer(row, row) / NOISE**2
        vector += row * value / NOISE**2
        factors.observe({name: 1.0}, value, NOISE)
    expected = np.linalg.solve(precision, vector)
    values, spreads = factors.estimates([{"pace": 1.0}, {"a": 1.0}, {"b": 1.0}], {"a": 1.0})
    assert values == pytest.approx(expected, abs=1e-9)
    found = np.linalg.inv(precision)
    assert spreads[2] ** 2 == pytest.approx(found[1, 1] + found[2, 2] - 2 * found[1, 2], abs=1e-9)


def test_what_is_common_is_booked_on_the_shared_term():
    factors = two()
    for number in range(100):
        factors.advance(0.2 * number)
        factors.observe({"a": 1.0}, 0.0 if number < 50 else math.log(4.0), NOISE)
    values, _ = factors.estimates([{"pace": 1.0}, {"a": 1.0}], {})
    assert values[0] == pytest.approx(math.log(4.0), abs=0.1)
    assert abs(values[1]) < 0.05


@pytest.mark.parametrize("seed", range(5))
def test_pairs_tell_of_a_difference_whatever_the_pace_does(seed):
    rng = random.Random(seed)
    factors, pace = two(), 0.0
    for number in range(120):
        factors.advance(0.2 * number)
        pace += rng.gauss(0.0, 0.05)
        name = "b" if number % 10 < 2 else "a"
        truth = pace + (0.4 if name == "b" else 0.0)
        factors.observe({name: 1.0}, truth + rng.gauss(0.0, NOISE), NOISE)
    dearer, spread = apart(factors)
    assert dearer == pytest.approx(0.4, abs=0.1)
    assert 0.0 < spread < 0.1


@pytest.mark.parametrize("lasting", [1, 2, 5, 20])
def test_a_disturbance_that_begins_with_a_trial_is_not_believed(lasting):
    factors = two()
    for number in range(100):
        factors.advance(0.2 * number)
        disturbed = math.log(4.0) if 50 <= number < 50 + lasting else 0.0
        factors.observe({"b" if 50 <= number < 52 else "a": 1.0}, disturbed, NOISE)
    dearer, spread = apart(factors)
    assert abs(dearer) < 2.0 * spread
    assert abs(dearer) < 0.25


def settled(name="a"):
    """Factors that have seen the machine at its usual pace for a while."""
    factors = two()
    for number in range(50):
        factors.advance(0.2 * number)
        factors.observe({name: 1.0}, 0.0, NOISE)
    return factors


@pytest.mark.parametrize("surprise", [math.log(3.0), -math.log(3.0)])
def test_a_surprise_counts_once_a_second_one_agrees_with_it(surprise):
    factors = settled()
    factors.observe({"a": 1.0}, surprise, NOISE)
    assert factors.shared == pytest.approx(0.0, abs=0.05)
    factors.observe({"a": 1.0}, surprise, NOISE)
    assert factors.shared == pytest.approx(surprise, rel=0.1)


def test_two_surprises_that_differ_are_chance():
    factors = settled()
    factors.observe({"a": 1.0}, math.log(3.0), NOISE)
    factors.observe({"a": 1.0}, -math.log(3.0), NOISE)
    assert factors.shared == pytest.approx(0.0, abs=0.05)


def test_what_is_stray_moves_no_pace_however_often_it_surprises():
    factors = settled()
    for _ in range(5):
        factors.observe({"b": 1.0}, math.log(4.0), NOISE, is_stray=True)
        ((found,), _) = factors.estimates([{"pace": 1.0, "a": 1.0}], {})
        assert found == pytest.approx(0.0, abs=0.1)
    dearer, _ = apart(factors)
    assert dearer > 0.1, "of b it tells something"


def test_the_first_observation_of_all_is_no_surprise():
    factors = two()
    factors.observe({"a": 1.0}, math.log(50.0), NOISE)
    assert factors.shared > 1.0


def test_age_leads_back_to_the_prior():
    factors = two()
    for _ in range(10):
        factors.observe({"a": 1.0}, 0.0, NOISE)
        factors.observe({"b": 1.0}, 0.3, NOISE)
    dearer, sure = apart(factors)
    factors.advance(300.0)
    later, unsure = apart(factors)
    assert later == pytest.approx(dearer * math.exp(-300.0 / OWN.lasting_s))
    assert unsure > 3 * sure
    factors.advance(1e6)
    assert apart(factors) == (pytest.approx(0.0), pytest.approx(math.hypot(OWN.spread, OWN.spread)))


def test_what_was_once_found_of_a_sum_is_recalled_without_the_shared_term():
    factors: DriftingFactors[str] = DriftingFactors("pace", PACE, 0.0)
    factors.add("a", OWN)
    factors.recall({"a": 1.0}, 0.2, 0.01)
    values, spreads = factors.estimates([{"a": 1.0}, {"pace": 1.0}], {})
    assert values.tolist() == pytest.approx([0.2, 0.0], abs=0.01)
    assert spreads.tolist() == pytest.approx([0.01, PACE.spread], abs=0.001)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.floats(-30, 30), st.floats(0, 1e5)), max_size=40))
def test_whatever_is_observed_the_estimates_are_numbers(seen):
    factors, now_s = two(), 0.0
    for name, value, after_s in seen:
        now_s += after_s
        factors.advance(now_s)
        factors.observe({name: 1.0}, value, NOISE)
        values, spreads = factors.estimates([{"a": 1.0}, {"b": 1.0}], {"a": 1.0})
        assert np.isfinite(values).all()
        assert np.isfinite(spreads).all()
