import pytest

from policies.cost_model import CostModelParameters
from policies.modes import DEFAULT_FACTOR, DecodePlan, Mode
from policies.policy import Decision, Policy, PolicyParameters, Snapshot
from policies.registry import PolicyError, create_policy, policy_names
from tests.policies.helpers import a_load, drive


class NightParameters(PolicyParameters):
    block_length: int = 4


class NightPolicy(Policy[None]):
    """A user's own, found by its dotted name."""

    name = "night"
    Parameters = NightParameters

    def __init__(self, parameters: NightParameters):
        super().__init__(parameters)
        self._plan = DecodePlan(Mode.SELF_SPECULATION, parameters.block_length)

    def resume(self, current, held_s, now_s):
        return None

    def decide(self, snapshot: Snapshot, state, now_s):
        return Decision(self._plan, "it is night"), None


def first_plan(policy):
    return drive(policy, [(0.0, a_load(1))])[0][1].decode


def test_the_named_policies():
    assert policy_names() == (
        "cost_model",
        "slo",
        "threshold",
        "fixed",
        "ar",
        "diffusion",
        "self_speculation",
    )
    assert first_plan(create_policy("fixed", {"mode": "diffusion", "block_length": 32})).block_length == 32
    assert first_plan(create_policy("threshold")).mode is Mode.DIFFUSION
    for mode in Mode:
        policy = create_policy(mode.value)
        assert (policy.name, first_plan(policy).mode) == ("fixed", mode)


def test_parameters_reach_the_policy_and_its_stabiliser():
    levels = [{"max_in_flight": 0, "mode": "self_speculation", "block_length": 4}]
    policy = create_policy("threshold", {"levels": levels, "stabilise": {"dwell_s": 9.0}})
    idle, busy = a_load(0), a_load(1)
    plans = [d.decode.mode for _, d in drive(policy, [(0.0, idle), (5.0, busy), (9.5, busy)])]
    assert plans == [Mode.SELF_SPECULATION, Mode.SELF_SPECULATION, Mode.AR]


def test_any_importable_policy():
    name = f"{__name__}.NightPolicy"
    policy = create_policy(name, {"block_length": 6, "stabilise": {"dwell_s": 0.0}})
    assert policy.name == "night"
    assert first_plan(policy) == DecodePlan(Mode.SELF_SPECULATION, 6)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("treshold", {}, r"unknown policy 'treshold': choose one of cost_model, slo, threshold, fixed, ar"),
        ("no.such.Policy", {}, r"can't be imported .*choose one of"),
        ("policies.replica_load.ReplicaLoad", {}, r"not a subclass"),
        ("threshold", {"bands": 1}, r"bands: Extra inputs.*keys: levels, above, band, stabilise"),
        ("threshold", {"stabilise": {"dwell": 1}}, r"dwell: .*keys: dwell_s, max_shifts_per_minute, margin"),
        ("threshold", {"stabilise": 3}, r"threshold: stabilise: parameters: .*dictionary"),
        ("fixed", {"mode": "turbo"}, r"mode: .*'ar', 'diffusion' or 'self_speculation'"),
        ("fixed", {"mode": "ar", "block_length": 8}, r"block_length for ar must be 1 to 1, got 8"),
        ("fixed", {"stabilise": {}}, r"stabilise: Extra"),
        ("ar", {"mode": "diffusion"}, r"mode is 'diffusion'; leave it out, or take policy fixed"),
        ("ar", {"threshold": 0.5}, r"threshold is diffusion's; leave it out with mode ar"),
        ("self_speculation", {"factor": 0.5}, r"factor is diffusion's; leave it out with mode self_spec"),
        (
            "threshold",
            {"levels": [{"max_in_flight": 2, "mode": "ar", "factor": 0.5}]},
            r"factor is diffusion's",
        ),
    ],
)
def test_errors_list_the_choices(name, parameters, message):
    with pytest.raises(PolicyError, match=message):
        create_policy(name, parameters)


@pytest.mark.parametrize("name", ["diffusion", "fixed", "threshold"])
def test_a_policy_that_names_no_bound_runs_diffusion_with_the_default_factor(name):
    policy = create_policy(name, {"mode": "diffusion"} if name == "fixed" else {})
    assert first_plan(policy).factor == DEFAULT_FACTOR


SAMPLED = a_load(1, risk=0.02)


@pytest.mark.parametrize(
    ("name", "parameters"), [("diffusion", {}), ("fixed", {"mode": "diffusion"}), ("threshold", {})]
)
def test_where_the_checkpoint_has_a_sampler_a_policy_that_names_no_bound_goes_by_it(name, parameters):
    [(_, decision)] = drive(create_policy(name, parameters), [(0.0, SAMPLED)])
    assert (decision.decode.mode, decision.decode.risk) == (Mode.DIFFUSION, 0.02)
    level = {"mode": "diffusion", "max_in_flight": 8, "factor": 0.1}
    other = {"levels": [level]} if name == "threshold" else {**parameters, "factor": 0.1}
    [(_, decision)] = drive(create_policy(name, other), [(0.0, SAMPLED)])
    assert (decision.decode.factor, decision.decode.risk) == (0.1, None)


def test_the_cost_model_considers_the_checkpoints_sampler_unless_a_bound_is_given():
    for given, expected in (({}, (None, 0.02)), ({"factor": 0.1}, (0.1, None))):
        plans = CostModelParameters(quality="any", **given).candidates(tuple(Mode), risk=0.02)
        assert {(p.factor, p.risk) for p in plans if p.mode is Mode.DIFFUSION} == {expected}
    policy = create_policy("cost_model", {"quality": "any", "speculation_blocks": [], "diffusion_gain": 0.0})
    [(_, decision)] = drive(policy, [(0.0, SAMPLED)])
    assert (decision.decode.mode, decision.decode.risk) == (Mode.DIFFUSION, 0.02)


@pytest.mark.parametrize(
    ("given", "expected"), [({}, (None, DEFAULT_FACTOR)), ({"threshold": 0.9}, (0.9, None))]
)
def test_the_cost_model_considers_the_default_factor_or_what_is_given(given, expected):
    plans = CostModelParameters(quality="any", **given).candidates(tuple(Mode))
    assert {(p.threshold, p.factor) for p in plans if p.mode is Mode.DIFFUSION} == {expected}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("fixed", {"mode": "diffusion"}),
        ("threshold", {}),
        ("cost_model", {"quality": "any"}),
        ("slo", {"quality": "any"}),
    ],
)
def test_a_factor_takes_the_place_of_a_threshold(name, parameters):
    if name == "threshold":
        level = {"mode": "diffusion", "block_length": 16, "max_in_flight": 8}
        assert first_plan(create_policy(name, {"levels": [{**level, "factor": 0.1}]})).factor == 0.1
        return
    policy = create_policy(name, {**parameters, "factor": 0.1})
    if name == "fixed":
        assert first_plan(policy).factor == 0.1
    with pytest.raises(PolicyError, match="factor takes the place of threshold; give one of them"):
        create_policy(name, {**parameters, "factor": 0.1, "threshold": 0.9})


def test_the_cost_model_considers_diffusion_by_its_factor():
    plans = CostModelParameters(quality="any", factor=0.1).candidates(tuple(Mode))
    assert {plan.factor for plan in plans if plan.mode is Mode.DIFFUSION} == {0.1}
    assert {plan.factor for plan in plans if plan.mode is not Mode.DIFFUSION} == {None}
