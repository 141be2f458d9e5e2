import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from policies.fixed import FixedPolicy, PlanParameters
from policies.modes import DecodePlan, Mode
from policies.policy import Snapshot
from policies.threshold import Level, ThresholdParameters, ThresholdPolicy
from tests.policies.helpers import a_load, drive

POLICY = ThresholdPolicy(ThresholdParameters())
DIFFUSION = DecodePlan(Mode.DIFFUSION, 16)
SPECULATION = DecodePlan(Mode.SELF_SPECULATION, 8)
AR = DecodePlan(Mode.AR)
RISING = [DIFFUSION, SPECULATION, AR]


def decided(num_in_flight, current=None, policy=POLICY, **load_changes):
    decision, _ = policy.decide(Snapshot(a_load(num_in_flight, **load_changes), current), None, 0.0)
    return decision.decode


@pytest.mark.parametrize(
    ("num_in_flight", "expected"),
    [(0, DIFFUSION), (2, DIFFUSION), (3, SPECULATION), (8, SPECULATION), (9, AR), (500, AR)],
)
def test_the_table_by_requests_running_and_waiting(num_in_flight, expected):
    assert decided(num_in_flight) == expected


@pytest.mark.parametrize(
    ("num_in_flight", "current", "expected"),
    [
        (8, AR, AR),
        (6, AR, AR),
        (5, AR, SPECULATION),
        (2, AR, SPECULATION),
        (1, AR, DIFFUSION),
        (2, SPECULATION, SPECULATION),
        (1, SPECULATION, DIFFUSION),
        (0, SPECULATION, DIFFUSION),
    ],
)
def test_a_level_is_come_back_to_below_its_band(num_in_flight, current, expected):
    assert decided(num_in_flight, current) == expected


def test_a_level_for_one_request_is_come_back_to_with_one_request():
    table = ThresholdParameters(levels=(Level(max_in_flight=1, mode=Mode.DIFFUSION, block_length=16),))
    policy = ThresholdPolicy(table)
    assert decided(2, DIFFUSION, policy) == AR
    assert decided(1, AR, policy) == DIFFUSION


def test_a_current_plan_of_no_level_counts_as_its_mode():
    assert decided(2, DecodePlan(Mode.SELF_SPECULATION, 4)) == SPECULATION


@pytest.mark.parametrize(
    ("modes", "low", "middle"),
    [
        ((Mode.AR, Mode.SELF_SPECULATION), SPECULATION, SPECULATION),
        ((Mode.AR, Mode.DIFFUSION), DIFFUSION, AR),
        ((Mode.AR,), AR, AR),
    ],
)
def test_levels_whose_mode_the_model_lacks_are_passed_over(modes, low, middle):
    assert decided(1, modes=modes) == low
    assert decided(5, modes=modes) == middle
    assert decided(50, modes=modes) == AR


def test_the_reason_names_the_count_and_the_level():
    decision, _ = POLICY.decide(Snapshot(a_load(9)), None, 0.0)
    assert decision.reason == "9 in flight; on the level above 8"
    decision, _ = POLICY.decide(Snapshot(a_load(7), AR), None, 0.0)
    assert decision.reason == "7 in flight; still on the level above 8"


@given(
    limits=st.lists(st.integers(1, 400), min_size=1, max_size=3, unique=True).map(sorted),
    centre=st.floats(1, 600),
    noise=st.lists(st.floats(-0.2, 0.2), min_size=2, max_size=60),
)
def test_noise_of_20_percent_shifts_at_most_once_per_level_and_never_back_and_forth(limits, centre, noise):
    modes = [Mode.DIFFUSION, Mode.SELF_SPECULATION, Mode.AR]
    levels = tuple(Level(max_in_flight=n, mode=mode) for n, mode in zip(limits, modes, strict=False))
    policy = ThresholdPolicy(ThresholdParameters(levels=levels))
    # Whole requests: below about ten, rounding alone is more than 20 %.
    counts = [max(1, round(centre * (1 + n))) if centre >= 10 else int(centre) for n in noise]
    plans = [d.decode for _, d in drive(policy, [(0.2 * i, a_load(n)) for i, n in enumerate(counts)])]
    levels_seen = [modes.index(plan.mode) for plan in plans]
    assert levels_seen == sorted(levels_seen)


@given(current=st.sampled_from(RISING), low=st.integers(0, 40), more=st.integers(0, 40))
def test_more_load_never_means_a_less_conservative_plan(current, low, more):
    assert RISING.index(decided(low, current)) <= RISING.index(decided(low + more, current))


@pytest.mark.parametrize(
    "parameters",
    [
        {"levels": [{"max_in_flight": 4, "mode": "diffusion"}, {"max_in_flight": 4, "mode": "ar"}]},
        {"levels": [{"max_in_flight": -1, "mode": "ar"}]},
        {"levels": [{"max_in_flight": 2, "mode": "ar", "block_length": 4}]},
        {"above": {"mode": "diffusion", "threshold": 0.0}},
        {"above": {"mode": "diffusion", "factor": 0.0}},
        {"above": {"mode": "diffusion", "factor": 0.1, "threshold": 0.9}},
        {"band": 1.0},
        {"bands": 0.2},
    ],
)
def test_bad_tables_are_refused(parameters):
    with pytest.raises(ValidationError):
        ThresholdParameters.model_validate(parameters)


def test_fixed_is_fixed_and_falls_back():
    policy = FixedPolicy(PlanParameters(mode=Mode.DIFFUSION, block_length=32))
    for num in (0, 100):
        assert decided(num, AR, policy) == DecodePlan(Mode.DIFFUSION, 32)
    assert decided(0, None, policy, modes=(Mode.AR,)) == AR
