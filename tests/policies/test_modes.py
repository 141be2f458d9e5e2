import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.control.codec import PLANS
from policies.control.plan import ReplicaPlan
from policies.modes import DEFAULT_FACTOR, DecodePlan, Mode, available_plan, default_plan, lossless_plan

DIFFUSION = DecodePlan(Mode.DIFFUSION, 32, 0.8)


@pytest.mark.parametrize(
    ("modes", "expected"),
    [
        (tuple(Mode), DIFFUSION),
        ((Mode.AR, Mode.SELF_SPECULATION), default_plan(Mode.SELF_SPECULATION)),
        ((Mode.AR,), default_plan(Mode.AR)),
    ],
)
def test_an_absent_mode_gives_way_to_the_next_more_conservative(modes, expected):
    assert available_plan(DIFFUSION, modes) == expected


def test_falling_back_never_goes_to_a_less_conservative_mode():
    assert available_plan(default_plan(Mode.SELF_SPECULATION), (Mode.AR, Mode.DIFFUSION)).mode is Mode.AR


@pytest.mark.parametrize(
    ("plan", "modes", "expected"),
    [
        (DIFFUSION, tuple(Mode), Mode.SELF_SPECULATION),
        (DIFFUSION, (Mode.AR, Mode.DIFFUSION), Mode.AR),
        (DecodePlan(Mode.SELF_SPECULATION, 4), tuple(Mode), Mode.SELF_SPECULATION),
        (default_plan(Mode.AR), tuple(Mode), Mode.AR),
    ],
)
def test_a_lossless_request_runs_the_plan_or_its_nearest_lossless_one(plan, modes, expected):
    assert lossless_plan(plan, modes).mode is expected
    if plan.mode is expected:
        assert lossless_plan(plan, modes) == plan


bounds = st.tuples(
    st.none() | st.floats(0.01, 1.0), st.none() | st.floats(0.01, 65.0), st.none() | st.floats(0.01, 64.0)
)


@given(st.sampled_from(Mode), bounds)
def test_plans_that_decode_alike_are_equal(mode, bound):
    """Diffusion has a threshold, a factor or a risk, the default factor without any; other modes none."""
    threshold, factor, risk = bound
    plan = DecodePlan(mode, 1 if mode is Mode.AR else 8, *bound)
    if mode is not Mode.DIFFUSION:
        expected = (None, None, None)
    elif risk is not None:
        expected = (None, None, risk)
    elif factor is None and threshold is not None:
        expected = (threshold, None, None)
    else:
        expected = (None, DEFAULT_FACTOR if factor is None else factor, None)
    assert (plan.threshold, plan.factor, plan.risk) == expected
    assert DecodePlan(plan.mode, plan.block_length, *expected) == plan


@pytest.mark.parametrize(
    "bound",
    [
        (0.0,),
        (1.1,),
        (None, 0.0),
        (None, 65.1),
        (2.0, 0.1),
        (None, None, 0.0),
        (None, None, 64.1),
        (None, 0.1, math.nan),
    ],
)
@pytest.mark.parametrize("mode", Mode)
def test_bounds_out_of_range_are_refused_in_every_mode(mode, bound):
    with pytest.raises(ValueError, match=r"threshold|factor|risk"):
        DecodePlan(mode, 1 if mode is Mode.AR else 8, *bound)


def test_a_checkpoints_sampler_bears_on_diffusion_alone():
    for mode in Mode:
        assert default_plan(mode, 0.02).risk == (0.02 if mode is Mode.DIFFUSION else None)


@pytest.mark.parametrize(
    ("plan", "threshold"),
    [(DecodePlan(Mode.DIFFUSION, 16, factor=0.2), 0.9), (default_plan(Mode.SELF_SPECULATION), 0.9)],
)
def test_a_plan_of_an_older_version_is_read_as_it_ran(plan, threshold):
    """There every plan had a threshold, which counted in diffusion alone, and not beside a factor."""
    body = json.loads(PLANS.encode(ReplicaPlan(1, plan, "rule", "reason")))
    body["body"]["decode"]["threshold"] = threshold
    assert PLANS.decode(json.dumps(body)).decode == plan
