"""Requests with a bound on quality: whatever the replica's plan and its trials, they run what keeps it."""

import random

import pytest

from policies.cost import RoundYield
from policies.modes import DecodePlan, Mode
from policies.policy import Trial
from replicas.config import EngineConfig
from replicas.engine.engine import Engine
from replicas.messages import DecodingOptions, SamplingParams
from tests.replicas.engine.scripted import ScriptedRunner, naive_ar
from tests.replicas.engine.test_engine import Clock, drain
from tests.thorough import num_cases

PROMPT = [5, 6, 7]
PLANS = (
    DecodePlan(Mode.AR),
    DecodePlan(Mode.SELF_SPECULATION, 6),
    *(DecodePlan(Mode.DIFFUSION, block, factor=factor) for block in (4, 8) for factor in (0.5, 2.0)),
)
DIFFERING = {DecodePlan(Mode.DIFFUSION, block, factor=0.5): 0.01 * block for block in (4, 8)}
"""Of the looser factor nothing is known."""
YIELDS = tuple(
    RoundYield(plan, float(plan.block_length), 1.0, 100.0, differing=differing)
    for plan, differing in DIFFERING.items()
)
SAMPLING = SamplingParams(max_tokens=60, ignore_eos=True)


@pytest.mark.parametrize("max_differing", [0.01, 0.05, 0.1])
def test_every_round_keeps_the_bound_whatever_plans_and_trials_come(max_differing: float) -> None:
    for seed in range(num_cases(30)):
        rng = random.Random(seed)
        clock = Clock()
        engine = Engine(ScriptedRunner(num_pages=400), EngineConfig(max_running=8), clock=clock)
        engine.set_yields(YIELDS)
        bounded = DecodingOptions(max_differing=max_differing)
        for number in range(4):
            options = bounded if number % 2 else DecodingOptions()
            engine.submit(str(number), [5 + number, *PROMPT], SAMPLING, options)
        while engine.has_work:
            if rng.random() < 0.2:
                engine.set_plan(rng.choice(PLANS), "rule")
            if rng.random() < 0.2:
                engine.set_trial(Trial(rng.choice(PLANS), 0.1, 0.1))
            for made in engine.step():
                plan = made.sequence.round_plan
                if made.sequence.decoding is bounded and plan is not None and plan.mode is Mode.DIFFUSION:
                    assert DIFFERING.get(plan, 1.0) <= max_differing
            clock.now_s += 0.05
            engine.check_integrity()


@pytest.mark.parametrize(
    ("active", "expected"),
    [
        (DecodePlan(Mode.DIFFUSION, 8, factor=2.0), DecodePlan(Mode.DIFFUSION, 8, factor=0.5)),
        (DecodePlan(Mode.DIFFUSION, 4, factor=2.0), DecodePlan(Mode.DIFFUSION, 4, factor=0.5)),
        (DecodePlan(Mode.DIFFUSION, 4, factor=0.5), DecodePlan(Mode.DIFFUSION, 4, factor=0.5)),
        (DecodePlan(Mode.DIFFUSION, 64, 0.9), DecodePlan(Mode.DIFFUSION, 8, factor=0.5)),
        (DecodePlan(Mode.DIFFUSION, 2, factor=2.0), None),
        (DecodePlan(Mode.SELF_SPECULATION, 6), None),
    ],
)
def test_a_bounded_request_has_the_tokens_of_a_plan_within_or_of_ar(
    active: DecodePlan, expected: DecodePlan | None
) -> None:
    engine = Engine(ScriptedRunner())
    engine.set_yields(YIELDS)
    engine.set_plan(active, "rule")
    sequence = engine.submit("r", PROMPT, SAMPLING, DecodingOptions(max_differing=0.1))
    drain(engine)
    if expected is None:
        assert sequence.tokens[3:] == naive_ar(PROMPT, 60, ignore_eos=True)
        return
    alone = Engine(ScriptedRunner())
    pinned = DecodingOptions(expected.mode, expected.block_length, factor=expected.factor)
    other = alone.submit("r", PROMPT, SAMPLING, pinned)
    drain(alone)
    assert sequence.tokens == other.tokens
    assert sequence.tokens[3:] != naive_ar(PROMPT, 60, ignore_eos=True)


def test_a_bound_that_nothing_measured_keeps_is_lossless_and_counted_so() -> None:
    engine = Engine(ScriptedRunner())
    engine.set_plan(DecodePlan(Mode.DIFFUSION, 8), "rule")
    unknown = engine.submit("unknown", PROMPT, SAMPLING, DecodingOptions(max_differing=1.0))
    engine.set_yields(YIELDS)
    engine.submit("known", PROMPT, SAMPLING, DecodingOptions(max_differing=0.1))
    load = engine.snapshot("r")
    assert (load.num_auto, load.num_lossless) == (2, 1)
    drain(engine)
    assert unknown.tokens[3:] == naive_ar(PROMPT, 60, ignore_eos=True)
