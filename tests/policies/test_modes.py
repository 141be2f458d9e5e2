import pytest

from policies.modes import DecodePlan, Mode, available_plan, default_plan, lossless_plan

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
