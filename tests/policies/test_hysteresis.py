from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.hysteresis import StabiliseParameters, WithHysteresis
from policies.modes import DecodePlan, Mode
from policies.policy import Decision, Policy, PolicyParameters, Snapshot, Trial
from policies.registry import create_policy
from tests.policies.helpers import a_load, drive

PERIOD_S = 0.2
DIFFUSION, AR = DecodePlan(Mode.DIFFUSION, 16), DecodePlan(Mode.AR)


class Nervous(Policy[int]):
    """Wants another mode at every call, for the gain it is told."""

    name = "nervous"

    def __init__(self, gain=None):
        super().__init__(PolicyParameters())
        self._gain = gain

    def resume(self, current, held_s, now_s):
        return 0

    def decide(self, snapshot, state, now_s):
        plan = AR if snapshot.current != AR else DIFFUSION
        return Decision(plan, "another", self._gain), state + 1


class Broken(Policy[None]):
    name = "broken"

    def resume(self, current, held_s, now_s):
        return None

    def decide(self, snapshot, state, now_s):
        raise ZeroDivisionError("no load, no answer")


def shifts(decisions):
    plans = [decision.decode for _, decision in decisions]
    times = [now_s for now_s, _ in decisions]
    return [t for t, (before, after) in zip(times[1:], pairwise(plans), strict=True) if before != after]


def at_every_period(loads):
    return [(PERIOD_S * index, load) for index, load in enumerate(loads)]


@given(
    threshold=st.integers(1, 300),
    dwell_s=st.floats(0.5, 5.0),
    band=st.floats(0.0, 0.9),
    noise=st.lists(st.floats(-0.2, 0.2), min_size=5, max_size=150),
    offset=st.floats(0.7, 1.4),
)
def test_at_most_one_shift_a_dwell_under_noise_around_any_threshold(threshold, dwell_s, band, noise, offset):
    policy = create_policy(
        "threshold",
        {
            "levels": [{"max_in_flight": threshold, "mode": "diffusion"}],
            "band": band,
            "stabilise": {"dwell_s": dwell_s, "max_shifts_per_minute": 1000},
        },
    )
    loads = [a_load(max(0, round(threshold * offset * (1 + n)))) for n in noise]
    times = shifts(drive(policy, at_every_period(loads)))
    assert all(later - earlier >= dwell_s for earlier, later in pairwise(times))


@given(
    noise=st.lists(st.floats(-0.2, 0.2), min_size=0, max_size=50),
    centre=st.integers(0, 40),
    step=st.sampled_from([(1, Mode.DIFFUSION), (4, Mode.SELF_SPECULATION), (16, Mode.AR), (64, Mode.AR)]),
)
def test_the_right_mode_is_reached_within_1_s_and_the_dwell_of_a_step_change(noise, centre, step):
    """With the defaults, whatever noise went before."""
    num_after, expected = step
    before = [a_load(max(0, round(centre * (1 + n)))) for n in noise]
    dwell_s = StabiliseParameters().dwell_s
    after = [a_load(num_after)] * (1 + round((1.0 + dwell_s) / PERIOD_S))
    decisions = drive(create_policy("threshold"), at_every_period([*before, *after]))
    assert decisions[-1][1].decode.mode is expected


def test_the_clock_decides_and_not_the_number_of_calls():
    policy = WithHysteresis(Nervous(), StabiliseParameters(dwell_s=2.0))
    often = [(0.01 * index, a_load(1)) for index in range(1000)]
    assert len(shifts(drive(policy, often))) == 4


def test_shifts_that_no_request_sees_are_free():
    policy = WithHysteresis(Nervous(), StabiliseParameters(dwell_s=0.0, max_shifts_per_minute=3))
    loads = [(float(second), a_load(1 if second >= 30 else 0)) for second in range(60)]
    times = shifts(drive(policy, loads))
    assert times == [float(second) for second in range(1, 33)]


def test_shifts_a_minute_are_bounded_and_come_again():
    policy = WithHysteresis(Nervous(), StabiliseParameters(dwell_s=0.0, max_shifts_per_minute=3))
    times = shifts(drive(policy, [(float(second), a_load(1)) for second in range(130)]))
    assert times == [1.0, 2.0, 3.0, 61.0, 62.0, 63.0, 121.0, 122.0, 123.0]


def test_a_gain_below_the_margin_is_not_worth_a_shift():
    small, large = Nervous(gain=0.05), Nervous(gain=0.2)
    bounds = StabiliseParameters(dwell_s=0.0, margin=0.1)
    ticks = at_every_period([a_load()] * 5)
    assert shifts(drive(WithHysteresis(small, bounds), ticks)) == []
    assert len(shifts(drive(WithHysteresis(large, bounds), ticks))) == 4


def test_a_held_back_shift_is_explained():
    policy = WithHysteresis(Nervous(), StabiliseParameters(dwell_s=1.0))
    (_, first), (_, held) = drive(policy, at_every_period([a_load()] * 2))
    assert held.decode == first.decode
    assert held.reason == "another; diffusion held back: 0.2 s of 1 s dwell"


def test_a_resumed_state_counts_the_time_already_held():
    policy = WithHysteresis(Nervous(), StabiliseParameters(dwell_s=1.0))
    recent = policy.resume(DIFFUSION, held_s=0.5, now_s=100.0)
    decision, _ = policy.decide(Snapshot(a_load(), DIFFUSION), recent, 100.4)
    assert decision.decode == DIFFUSION
    decision, _ = policy.decide(Snapshot(a_load(), DIFFUSION), recent, 100.6)
    assert decision.decode == AR


def test_a_mode_the_model_lacks_is_left_at_once():
    policy = create_policy("threshold")
    state = policy.resume(DIFFUSION, held_s=0.0, now_s=0.0)
    decision, _ = policy.decide(Snapshot(a_load(modes=(Mode.AR,)), DIFFUSION), state, 0.1)
    assert decision.decode == AR


def test_a_policy_that_fails_leaves_the_replica_as_it_is(caplog):
    policy = WithHysteresis(Broken(PolicyParameters()), StabiliseParameters())
    state = policy.resume(DIFFUSION, 0.0, 0.0)
    for now_s in (1.0, 2.0):
        decision, state = policy.decide(Snapshot(a_load(), DIFFUSION), state, now_s)
        assert decision.decode == DIFFUSION
        assert "no load, no answer" in decision.reason
    assert len(caplog.records) == 1
    assert drive(policy, [(0.0, a_load())])[0][1].decode == AR


class Careless(Policy[None]):
    """Gives what it is told to, whether or not that is a decision or a trial."""

    name = "careless"

    def __init__(self, decision=None, trial=None, state_fails=False):
        super().__init__(PolicyParameters())
        self._decision = decision
        self._trial = trial
        self._state_fails = state_fails

    def resume(self, current, held_s, now_s):
        if self._state_fails:
            raise KeyError("no state")

    def decide(self, snapshot, state, now_s):
        return self._decision, state

    def trial(self, load, running):
        return self._trial


@pytest.mark.parametrize(
    "decision",
    [None, Decision("ar", "a name"), Decision(AR, None), Decision(AR, 3), Decision(AR, "", "10 %")],
)
def test_what_is_no_decision_leaves_the_replica_as_it_is(decision):
    policy = WithHysteresis(Careless(decision), StabiliseParameters())
    state = policy.resume(DIFFUSION, 0.0, 0.0)
    for now_s in (1.0, 2.0):
        kept, state = policy.decide(Snapshot(a_load(), DIFFUSION), state, now_s)
        assert kept.decode == DIFFUSION
        assert "policy failed" in kept.reason


@pytest.mark.parametrize(
    "trial",
    [AR, "ar", Trial("ar", 0.1, 0.02), Trial(AR, float("nan"), 0.02), Trial(AR, 0.1, float("inf"))],
)
def test_what_is_no_trial_is_none(trial, caplog):
    policy = WithHysteresis(Careless(Decision(AR, ""), trial), StabiliseParameters())
    assert policy.trial(a_load(1), AR) is None
    assert len(caplog.records) == 1
    right = Trial(DIFFUSION, 0.1, 0.02)
    assert WithHysteresis(Careless(trial=right), StabiliseParameters()).trial(a_load(1), AR) == right


def test_a_policy_that_can_not_go_on_from_a_plan_begins_without_a_state(caplog):
    policy = WithHysteresis(Careless(Decision(AR, "ok"), state_fails=True), StabiliseParameters())
    decision, _ = policy.decide(Snapshot(a_load()), policy.resume(None, 0.0, 0.0), 0.0)
    assert decision.decode == AR
    assert len(caplog.records) == 1
