import random
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from policies.cost import ModeFactors, ReplicaCosts, RoundYield, StepCost
from policies.cost_model import CostModelParameters, CostModelPolicy
from policies.forecast import forecast
from policies.modes import LOSSLESS_MODES, DecodePlan, Mode
from policies.policy import Snapshot
from policies.registry import create_policy
from policies.slo import SloParameters, SloPolicy, ttft_s
from tests.policies.helpers import a_load, drive
from tests.thorough import examples

PERIOD_S = 0.2
AR = DecodePlan(Mode.AR)
# As an accelerator: flat while bound by memory, then linear. Blocks win alone, ar in a crowd.
GPU = StepCost((1, 64, 128, 512), (7.0, 8.0, 12.0, 60.0), segment_ms=0.02, cached_ms=0.3)


def speculation(block):
    return DecodePlan(Mode.SELF_SPECULATION, block)


def diffusion(block):
    return DecodePlan(Mode.DIFFUSION, block)


def measured(diffusion_forwards=4.0, step=GPU, num_rounds=100.0):
    yields = [
        RoundYield(speculation(4), 3.4, 2.0, num_rounds),
        RoundYield(speculation(8), 5.5, 2.0, num_rounds),
        RoundYield(speculation(16), 7.5, 2.0, num_rounds),
        RoundYield(speculation(32), 8.5, 2.0, num_rounds),
        *(RoundYield(diffusion(b), float(b), diffusion_forwards * b / 16, num_rounds) for b in (8, 16, 32)),
    ]
    return ReplicaCosts(step, tuple(yields))


def a_replica(num_auto, costs=None, **changes):
    costs = measured() if costs is None else costs
    values = {"costs": costs, "max_running": 256, "num_pages": 10_000, "mean_context": 200.0}
    return a_load(num_auto, **{**values, **changes})


def free(**parameters):
    """Parameters that let diffusion run, unless they say otherwise."""
    return CostModelParameters(**{"quality": "any", **parameters})


def decided(load, current=None, **parameters):
    policy = CostModelPolicy(free(**parameters))
    return policy.decide(Snapshot(load, current), (), 0.0)[0]


def best_of(load, **parameters):
    plans = free(**parameters).candidates(load.modes)
    return max(forecast(load, plan).tokens_per_s for plan in plans)


@pytest.mark.parametrize("num", [1, 2, 4, 8, 16, 32, 64, 128])
@pytest.mark.parametrize("forwards", [2.0, 4.0, 8.0])
def test_what_it_picks_is_within_the_price_of_diffusion_of_the_best(num, forwards):
    load = a_replica(num, measured(forwards))
    best = best_of(load)
    assert forecast(load, decided(load, diffusion_gain=0.0).decode).tokens_per_s == best
    assert forecast(load, decided(load).decode).tokens_per_s >= best / 1.05


def test_more_load_means_shorter_blocks_and_then_ar():
    plans = [decided(a_replica(num, measured(8.0))).decode for num in (1, 4, 16, 64, 250)]
    blocks = [plan.block_length for plan in plans]
    assert blocks == sorted(blocks, reverse=True)
    assert (plans[0].mode, plans[-1]) == (Mode.SELF_SPECULATION, AR)


def test_quality_lossless_the_default_never_runs_diffusion_however_fast():
    fast = a_replica(1, measured(1.5))
    assert decided(fast).decode.mode is Mode.DIFFUSION
    assert decided(fast, quality="lossless").decode.mode is Mode.SELF_SPECULATION
    assert CostModelParameters().quality == SloParameters().quality == "lossless"
    assert (
        tried(a_replica(1, measured(1.5, num_rounds=0.0)), AR, quality="lossless").plan.mode in LOSSLESS_MODES
    )


def test_diffusion_must_be_worth_its_price():
    load = a_replica(1, measured(3.6))
    gain = (
        max(forecast(load, diffusion(b)).tokens_per_s for b in (8, 16, 32))
        / best_of(load, quality="lossless")
        - 1
    )
    assert gain > 0.0
    assert decided(load, diffusion_gain=gain * 0.9).decode.mode is Mode.DIFFUSION
    assert decided(load, diffusion_gain=gain * 1.1).decode.mode is Mode.SELF_SPECULATION


def test_diffusion_runs_at_the_threshold_that_bounds_its_quality():
    chosen = decided(a_replica(1, measured(1.5)), threshold=0.95).decode
    assert (chosen.mode, chosen.threshold) == (Mode.DIFFUSION, 0.95)


@pytest.mark.parametrize("modes", [(Mode.AR,), (Mode.AR, Mode.SELF_SPECULATION), (Mode.AR, Mode.DIFFUSION)])
def test_a_mode_the_model_lacks_is_no_candidate(modes):
    for num in (1, 100):
        assert decided(a_replica(num, modes=modes)).decode.mode in modes


def test_pinned_requests_prefill_and_memory_bear_on_the_choice():
    alone = decided(a_replica(4), quality="lossless").decode
    assert alone.block_length == 16
    crowded = a_replica(4, pinned_by_mode={Mode.AR: 100})
    assert decided(crowded, quality="lossless").decode.block_length < alone.block_length
    prefilling = a_replica(4, prefill_per_token=20.0)
    assert decided(prefilling, quality="lossless").decode.block_length < alone.block_length
    short = a_replica(4, mean_completion=3.0)
    assert decided(short, quality="lossless").decode.block_length < alone.block_length


def test_memory_too_small_for_long_blocks_means_short_ones():
    """64 sequences of 16 tokens in 70 pages: with blocks of 32 only 23 of them run at once."""
    flat = StepCost((1, 4096), (10.0, 10.001))
    roomy = a_replica(64, measured(step=flat), mean_context=16.0, max_step_tokens=4096)
    tight = a_replica(64, measured(step=flat), mean_context=16.0, max_step_tokens=4096, num_pages=70)
    assert decided(roomy, quality="lossless").decode == speculation(32)
    assert decided(tight, quality="lossless").decode == speculation(16)


def test_lossless_requests_are_judged_by_what_they_run():
    """Where all are lossless, diffusion brings nobody anything."""
    load = a_replica(4, measured(2.0))
    all_lossless = a_replica(4, measured(2.0), num_lossless=4)
    assert decided(load).decode.mode is Mode.DIFFUSION
    assert decided(all_lossless).decode.mode is Mode.SELF_SPECULATION


def test_the_reason_names_inputs_and_what_was_compared():
    reason = decided(a_replica(3)).reason
    assert reason.startswith("3 in flight, 3 auto; tokens/s expected: ")
    assert all(mode in reason for mode in Mode)
    assert "nothing measured yet" in decided(a_load(3)).reason


def test_unmeasured_it_still_goes_from_blocks_to_ar():
    assert decided(a_load(1, max_running=256)).decode.mode is Mode.SELF_SPECULATION
    assert decided(a_load(200, max_running=256, num_pages=9999)).decode == AR


def test_a_plan_of_another_policys_is_left_at_once():
    assert decided(a_replica(1), current=DecodePlan(Mode.DIFFUSION, 7, 0.3)).gain is None


def tried(load, running, **parameters):
    return CostModelPolicy(free(**parameters)).trial(load, running)


def sure(costs, spread=0.02):
    """The same costs, with the modes' factors known to be 1 as well as that."""
    return replace(costs, factors={mode: ModeFactors((0.0,), (spread,)) for mode in Mode})


def test_what_is_known_to_be_worse_is_not_tried():
    load = a_replica(1, sure(measured(num_rounds=300.0)))
    assert tried(load, decided(load).decode) is None


def test_a_plan_is_tried_that_may_exceed_the_best_and_of_several_the_most_promising():
    load = a_replica(1, sure(measured(num_rounds=300.0), spread=0.3))
    running = decided(load).decode
    trial = tried(load, running)
    worths = {p: forecast(load, p).tokens_per_s for p in free().candidates(load.modes)}
    assert trial.plan not in (running, AR)  # which is far behind at this load
    assert worths[trial.plan] >= 0.5 * max(worths.values())
    assert trial.share == 0.02
    assert 0.1 <= trial.loss < 1.0


def test_a_plan_that_never_ran_is_tried_before_those_that_did():
    """Its prior may be wrong by much more than what was measured."""
    costs = sure(measured(num_rounds=300.0))
    unknown = tuple(
        replace(entry, num_rounds=0.0) if entry.plan == speculation(8) else entry for entry in costs.yields
    )
    load = a_replica(1, replace(costs, yields=unknown))
    assert tried(load, decided(load).decode).plan == speculation(8)


def test_a_trial_costs_what_it_is_expected_to_lose():
    load = a_replica(16, sure(measured(6.0, num_rounds=0.0)))
    running = decided(load).decode
    trial = tried(load, running, diffusion_gain=0.0)
    lost = 1.0 - forecast(load, trial.plan).tokens_per_s / forecast(load, running).tokens_per_s
    assert trial.loss == pytest.approx(max(0.1, lost), abs=0.05)


def test_nothing_is_tried_without_requests_costs_or_leave():
    load = a_replica(1, measured(num_rounds=0.0))
    assert tried(load, AR) is not None
    assert tried(a_replica(0, measured(num_rounds=0.0)), AR) is None
    assert tried(a_load(1), AR) is None
    assert tried(load, AR, explore=0.0) is None


def crossovers(costs):
    """Loads whose best plan is not that of one request more."""
    best = {num: decided(a_replica(num, costs)).decode for num in range(1, 100)}
    return [num for num in range(1, 99) if best[num] != best[num + 1]]


def shifts(decisions):
    plans = [decision.decode for _, decision in decisions]
    times = [now_s for now_s, _ in decisions]
    return [t for t, (before, after) in zip(times[1:], pairwise(plans), strict=True) if before != after]


forwards = st.sampled_from([4.0, 6.0, 10.0])


@examples(25)
@given(
    data=st.data(),
    diffusion_forwards=forwards,
    noise=st.lists(st.floats(-0.2, 0.2), min_size=20, max_size=100),
    errors=st.lists(st.floats(-0.1, 0.1), min_size=100, max_size=100),
    dwell_s=st.floats(0.5, 3.0),
)
def test_noise_of_20_percent_around_any_crossover_shifts_at_most_once_a_dwell(
    data, diffusion_forwards, noise, errors, dwell_s
):
    """The load's noise, and one of 10 % in the costs beside it."""
    costs = measured(diffusion_forwards)
    num = data.draw(st.sampled_from(crossovers(costs)))
    policy = create_policy(
        "cost_model", {"quality": "any", "stabilise": {"dwell_s": dwell_s, "max_shifts_per_minute": 1000}}
    )
    loads = []
    for n, error in zip(noise, errors, strict=False):
        noisy = ReplicaCosts(costs.step.scaled(1.0 + error), costs.yields)
        loads.append(a_replica(max(0, round(num * (1 + n))), noisy))
    arrivals = [(PERIOD_S * index, load) for index, load in enumerate(loads)]
    times = shifts(drive(policy, arrivals))
    assert all(later - earlier >= dwell_s - 1e-9 for earlier, later in pairwise(times))


@pytest.mark.parametrize("diffusion_forwards", [4.0, 6.0, 10.0])
def test_noise_of_20_percent_shifts_less_often_than_the_dwell_would_let_it(diffusion_forwards):
    """The smoothed load and the margin hold back most of what would shift: of 75 chances in a minute."""
    costs = measured(diffusion_forwards)
    rng = random.Random(7)
    for num in crossovers(costs):
        loads = [a_replica(max(1, round(num * rng.uniform(0.8, 1.2))), costs) for _ in range(300)]
        arrivals = [(PERIOD_S * index, load) for index, load in enumerate(loads)]
        policy = create_policy("cost_model", {"quality": "any", "stabilise": {"max_shifts_per_minute": 1000}})
        assert len(shifts(drive(policy, arrivals))) <= 18


DWELLS_A_ROUNDING_LESS = [40, 190, 26, 111, 96, 138, 75, 140, 64, 182, 122, 80, 25, 53, 166]
"""A load before a shift from which four periods add up to a hair less than its dwell."""


@examples(25)
@given(
    before=st.lists(st.integers(0, 200), min_size=0, max_size=40),
    after=st.sampled_from([1, 2, 4, 8, 16, 32, 64, 128, 200]),
    diffusion_forwards=forwards,
)
@example(before=DWELLS_A_ROUNDING_LESS, after=4, diffusion_forwards=6.0)
def test_within_1_s_of_a_step_change_the_plan_is_right(before, after, diffusion_forwards):
    """Right: nothing brings more by the margin, for which no shift is made."""
    costs = measured(diffusion_forwards)
    num_after = 1 + round(1.0 / PERIOD_S)
    loads = [a_replica(num, costs) for num in before] + [a_replica(after, costs)] * num_after
    arrivals = [(PERIOD_S * index, load) for index, load in enumerate(loads)]
    policy = create_policy(
        "cost_model", {"quality": "any", "diffusion_gain": 0.0, "stabilise": {"max_shifts_per_minute": 1000}}
    )
    plan = drive(policy, arrivals)[-1][1].decode
    assert forecast(loads[-1], plan).tokens_per_s * 1.1 >= best_of(loads[-1])


@pytest.mark.parametrize(
    "parameters",
    [
        {"quality": "best"},
        {"quality": 0.01},
        {"quality": {}},
        {"quality": {"max_differing": 0.01, "min_right": 0.9}},
        {"threshold": 0.0},
        {"speculation_blocks": [1]},
        {"diffusion_blocks": [128]},
        {"explore": 0.5},
        {"margin": 0.1},
        {"threshold": 0.9},
        {"factor": 0.1, "quality": "lossless"},
        {"diffusion_gain": 0.0},
        {"diffusion_blocks": [16]},
    ],
)
def test_bad_parameters_are_refused(parameters):
    with pytest.raises(ValidationError):
        CostModelParameters.model_validate(parameters)


def slo(load, current=None, **parameters):
    policy = SloPolicy(SloParameters(**{"quality": "any", **parameters}))
    return policy.decide(Snapshot(load, current), (), 0.0)[0]


def test_where_all_requests_are_lossless_no_diffusion_is_tried():
    unknown = tuple(
        replace(entry, num_rounds=0.0 if entry.plan.mode is Mode.DIFFUSION else 300.0)
        for entry in measured(2.0).yields
    )
    costs = sure(replace(measured(2.0), yields=unknown))
    running = decided(a_replica(4, costs, num_lossless=4)).decode
    assert tried(a_replica(4, costs, num_lossless=3), running).plan.mode is Mode.DIFFUSION
    every = tried(a_replica(4, costs, num_lossless=4), running)
    assert every is None or every.plan.mode in LOSSLESS_MODES


def test_a_dip_between_two_looks_is_no_change_of_load():
    """Requests that end together and come again at once."""
    policy = create_policy("cost_model", {"quality": "any"})
    loads = [a_replica(1 if index % 5 == 4 else 64) for index in range(60)]
    plans = [d.decode for _, d in drive(policy, [(PERIOD_S * i, load) for i, load in enumerate(loads)])]
    steady = decided(a_replica(64)).decode
    assert steady != decided(a_replica(1)).decode
    assert set(plans) == {steady}


@pytest.mark.parametrize(("before", "after"), [(1, 64), (64, 1)])
def test_a_leap_of_the_load_counts_at_the_second_look(before, after):
    policy = create_policy("cost_model", {"quality": "any", "stabilise": {"dwell_s": 0.0}})
    loads = [a_replica(before)] * 10 + [a_replica(after)] * 2
    plans = [d.decode for _, d in drive(policy, [(PERIOD_S * i, load) for i, load in enumerate(loads)])]
    assert plans[-2] == decided(a_replica(before)).decode
    assert plans[-1] == decided(a_replica(after)).decode != plans[-2]


def test_while_only_pinned_requests_run_the_plan_stays():
    pinned = replace(a_replica(40, pinned_by_mode={Mode.DIFFUSION: 40}), num_auto=0)
    for plan in (AR, speculation(4), diffusion(32)):
        assert decided(pinned, current=plan).decode == plan
    assert decided(a_replica(0), current=AR).decode != AR


def test_slo_is_the_fastest_plan_where_every_plan_is_in_time():
    for num in (1, 16, 100):
        assert slo(a_replica(num), tpot_s=9.0, ttft_s=9.0).decode == decided(a_replica(num)).decode


@pytest.mark.parametrize("num_between", [0, 1, 8, 40])
@pytest.mark.parametrize("turnaround_s", [0.001, 0.02, 0.4])
def test_slo_is_the_fastest_plan_where_clients_are_between_two_requests(num_between, turnaround_s):
    """Under a plan that answers sooner more of them are, and fewer in flight: no fault of it."""
    for num in (1, 16, 100):
        load = a_replica(num, num_between=num_between, turnaround_s=turnaround_s, mean_completion=60.0)
        assert slo(load, tpot_s=9.0, ttft_s=9.0).decode == decided(load).decode


def test_slo_gives_up_throughput_for_the_pace_of_requests():
    """More tokens a second by one group's long blocks, but pinned ar requests would then be too slow."""
    load = a_replica(24, measured(2.0), pinned_by_mode={Mode.AR: 24})
    fastest = forecast(load, decided(load).decode)
    ar_tpot_s = fastest.tpots[1][1]
    careful = forecast(load, slo(load, tpot_s=ar_tpot_s * 0.9).decode)
    assert careful.plan != fastest.plan
    assert careful.tokens_per_s < fastest.tokens_per_s
    assert careful.tpots[1][1] <= 0.9 * ar_tpot_s


def test_slo_lets_the_running_plan_use_the_headroom():
    load = a_replica(24, measured(2.0), pinned_by_mode={Mode.AR: 24})
    fastest = decided(load).decode
    target_s = forecast(load, fastest).tpots[1][1] * 1.05
    assert slo(load, tpot_s=target_s).decode != fastest
    assert slo(load, current=fastest, tpot_s=target_s).decode == fastest


def test_slo_hopeless_is_the_fastest():
    load = a_replica(100)
    assert slo(load, tpot_s=1e-6, ttft_s=1e-6).decode == decided(load).decode


def test_the_time_to_the_first_token_grows_with_prompts_and_requests_ahead():
    load = a_replica(4)
    expected = forecast(load, AR)
    alone = ttft_s(load, expected)
    assert alone == pytest.approx(expected.step_ms / 1000)
    prompts = ttft_s(a_replica(4, waiting_prompt_tokens=5080), expected)
    assert prompts == pytest.approx(alone * 11, rel=0.01)
    blocked = a_replica(10, max_running=8, mean_remaining=50.0)
    assert ttft_s(blocked, expected) == pytest.approx(alone + 2 * 50.0 / expected.tokens_per_s)


def test_slo_is_not_moved_by_a_rounding():
    """Shares of requests that are in time differ by a plan's numbers in flight in their last digit."""
    step = StepCost((1, 32, 512), (10.0, 12.0, 60.0))
    waiting = {"turnaround_s": 0.1, "num_between": 4, "mean_completion": 30.0, "mean_context": 100.0}
    load = a_load(14, max_running=64, num_pages=4000, num_auto=5, pinned_by_mode={Mode.AR: 9}, **waiting)
    load = replace(load, costs=ReplicaCosts(step), num_running=14, num_waiting=0)
    chosen = slo(load, quality="lossless", tpot_s=0.01).decode
    plans = [DecodePlan(Mode.SELF_SPECULATION, block) for block in (4, 8, 16, 32)]
    fastest = max(plans, key=lambda plan: forecast(load, plan).tokens_per_s)
    assert chosen == fastest
