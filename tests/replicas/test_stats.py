from dataclasses import replace

import pytest

from policies.cost import ReplicaCosts, StepCost
from policies.modes import DecodePlan, Mode
from policies.policy import Trial
from replicas.engine.engine import Engine
from replicas.messages import SamplingParams
from replicas.stats import WINDOW_S, DecodingStats, EngineSnapshot, LoadMeter
from tests.replicas.engine.scripted import ScriptedRunner


def test_rates_follow_and_fade() -> None:
    now_s = 0.0
    stats = DecodingStats(lambda: now_s)
    for second in range(1, 21):
        now_s = float(second)
        stats.update(
            30 * second,
            60 * second,
            {Mode.AR: 10 * second, Mode.DIFFUSION: 20 * second},
            {Mode.AR: 10 * second, Mode.DIFFUSION: 8 * second},
        )
    assert stats.tokens_per_s == pytest.approx(30, rel=0.01)
    assert stats.tokens_per_forward == pytest.approx({Mode.AR: 1.0, Mode.DIFFUSION: 2.5})
    now_s = 20.0 + 5 * WINDOW_S
    stats.update(600, 1200, {Mode.AR: 200, Mode.DIFFUSION: 400}, {Mode.AR: 200, Mode.DIFFUSION: 160})
    assert stats.tokens_per_s < 0.5
    assert stats.tokens_per_forward[Mode.DIFFUSION] == pytest.approx(2.5)


def test_a_second_reading_at_the_same_time_changes_nothing() -> None:
    stats = DecodingStats(lambda: 1.0)
    stats.update(10, 0, {Mode.AR: 10}, {Mode.AR: 10})
    assert stats.tokens_per_s == 0.0


def serve(meter_costs: ReplicaCosts, trial: Trial | None, num_steps: int = 400) -> LoadMeter:
    """One `ar` request after another, a step in 25 ms, measured five times a second."""
    now_s = 0.0

    def clock() -> float:
        return now_s

    engine = Engine(ScriptedRunner(num_pages=400), clock=clock)
    engine.set_plan(DecodePlan(Mode.AR), "rule")
    engine.set_trial(trial)
    meter = LoadMeter(engine, clock, meter_costs)
    for step in range(num_steps):
        if not engine.has_work:
            engine.submit(str(step), [5, 6], SamplingParams(max_tokens=60, ignore_eos=True))
        engine.step()
        now_s += 0.025
        if step % 8 == 7:
            load = meter.measure(EngineSnapshot.read(engine, "r"), 0.0)
            assert load.costs == meter.costs
    return meter


def test_costs_and_rates_are_learned_from_what_was_served() -> None:
    """Forwards take 25 ms and not 10, and a token comes with each of them but those that prefill."""
    costs = serve(ReplicaCosts(StepCost((1, 512), (10.0, 20.0))), None).costs
    assert costs is not None
    assert costs.factor(Mode.AR, 1)[0] * costs.step.ms(1) == pytest.approx(25.0, rel=0.1)
    assert set(costs.rates) == {Mode.AR}
    foretold = costs.rate_factor(Mode.AR, 1) * 1000.0 / (costs.factor(Mode.AR, 1)[0] * costs.step.ms(1))
    assert foretold == pytest.approx(40.0, rel=0.1)


def test_a_trial_teaches_of_its_mode() -> None:
    start = ReplicaCosts(StepCost((1, 512), (10.0, 20.0)))
    trial = Trial(DecodePlan(Mode.SELF_SPECULATION, 8), 0.1, 0.1)
    costs = serve(start, trial).costs
    assert costs is not None
    assert set(costs.factors) == {Mode.AR, Mode.SELF_SPECULATION}
    assert any(entry.plan == trial.plan and entry.num_rounds > 1 for entry in costs.yields)


def test_what_was_learned_lasts_over_any_number_of_starts() -> None:
    """What is published is known at the next start; forecasts by it must not be compared with it again."""
    costs = ReplicaCosts(StepCost((1, 512), (10.0, 20.0)))
    factors = []
    for _ in range(4):
        learned = serve(costs, None, 1600).costs
        assert learned is not None
        factors.append(learned.rate_factor(Mode.AR, 1))
        costs = replace(costs, factors=learned.factors, rates=learned.rates)
    assert factors == pytest.approx([factors[0]] * 4, rel=0.05)
