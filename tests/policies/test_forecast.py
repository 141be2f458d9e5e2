import math

import pytest

from policies.cost import ModeFactors, ReplicaCosts, RoundYield, StepCost
from policies.forecast import forecast
from policies.modes import DecodePlan, Mode
from tests.policies.helpers import a_load

AR = DecodePlan(Mode.AR)
SPECULATION = DecodePlan(Mode.SELF_SPECULATION, 8)
DIFFUSION = DecodePlan(Mode.DIFFUSION, 16)
STEP = StepCost((1, 101), (10.0, 60.0))  # 10 ms, and half a ms for every token after the first
COSTS = ReplicaCosts(STEP, (RoundYield(SPECULATION, 6.0, 2.0, 50), RoundYield(DIFFUSION, 16.0, 4.0, 50)))


def a_replica(num_auto, **changes):
    values = {"costs": COSTS, "max_running": 64, "num_pages": 4096, "mean_context": 100.0}
    return a_load(num_auto, **{**values, **changes})


@pytest.mark.parametrize(
    ("plan", "num", "tokens_per_s", "step_ms"),
    [
        (AR, 1, 1 / 0.010, 10.0),
        (AR, 21, 21 / 0.020, 20.0),
        (SPECULATION, 4, 4 * 3 / 0.0255, 25.5),
        (DIFFUSION, 2, 2 * 4 / 0.0255, 25.5),
    ],
)
def test_the_formula(plan, num, tokens_per_s, step_ms):
    """C y / (F L(C B)), and each request's pace is its share."""
    expected = forecast(a_replica(num), plan)
    assert expected.tokens_per_s == pytest.approx(tokens_per_s)
    assert expected.step_ms == pytest.approx(step_ms)
    assert expected.tpot_s == pytest.approx(num / tokens_per_s)


def test_forwards_that_begin_the_next_block_too_have_more_rows():
    costs = ReplicaCosts(STEP, (RoundYield(DIFFUSION, 16.0, 3.0, 50, rows=64 / 3),))
    expected = forecast(a_replica(2, costs=costs), DIFFUSION)
    assert expected.step_ms == pytest.approx(10.0 + 0.5 * (2 * 64 / 3 - 1))
    assert expected.tokens_per_s == pytest.approx(1000 * 2 * 16 / 3 / expected.step_ms)


def test_a_forward_takes_what_the_mode_of_most_requests_takes():
    slow = STEP.scaled(3.0)
    costs = ReplicaCosts(STEP, COSTS.yields, {Mode.AR: ModeFactors((math.log(3.0),), (0.1,))})
    assert forecast(a_replica(4, costs=costs), AR).step_ms == pytest.approx(slow.ms(4))
    assert forecast(a_replica(4, costs=costs), SPECULATION).step_ms == pytest.approx(STEP.ms(32))
    crowded = a_replica(2, costs=costs, pinned_by_mode={Mode.AR: 6})
    assert forecast(crowded, SPECULATION).step_ms == pytest.approx(slow.ms(2 * 8 + 6))


def test_an_idle_replica_is_judged_by_one_request():
    assert forecast(a_replica(0), SPECULATION) == forecast(a_replica(1), SPECULATION)


def test_pinned_requests_take_their_share_of_every_forward():
    expected = forecast(a_replica(1, pinned_by_mode={Mode.AR: 20}), SPECULATION)
    assert expected.step_ms == pytest.approx(10.0 + 0.5 * 27)
    assert expected.tokens_per_s == pytest.approx(1000 * (3 + 20) / 23.5)
    assert expected.tpot_s == pytest.approx(23.5 / 3 / 1000)


def test_lossless_requests_do_not_follow_into_diffusion():
    mixed = forecast(a_replica(2, num_lossless=1), DIFFUSION)
    rows = COSTS.yield_of(DecodePlan(Mode.SELF_SPECULATION, 16)).rows_per_forward
    assert mixed.step_ms == pytest.approx(10.0 + 0.5 * (16 + rows - 1))
    pure = forecast(a_replica(2, num_lossless=1), AR)
    assert pure.tpots == ((1, 0.0105), (1, 0.0105))
    assert pure.tokens_per_s == forecast(a_replica(2), AR).tokens_per_s


def test_requests_beyond_the_places_wait():
    expected = forecast(a_replica(40, max_running=10), AR)
    assert expected.tokens_per_s == pytest.approx(forecast(a_replica(10), AR).tokens_per_s)
    assert expected.tpot_s == pytest.approx(forecast(a_replica(10), AR).tpot_s)


def test_blocks_beyond_the_tokens_of_a_step_take_turns():
    expected = forecast(a_replica(64), DIFFUSION)
    assert expected.step_ms == pytest.approx(10.0 + 0.5 * 511)
    assert expected.tokens_per_s == pytest.approx(1000 * 32 * 4 / expected.step_ms)
    assert expected.tpot_s == pytest.approx(2 * expected.step_ms / 4 / 1000)


@pytest.mark.parametrize(("per_token", "room"), [(0.05, 512 - 0.05 * 128), (0.5, 512 - 64), (9.0, 384)])
def test_prompts_take_what_they_need_from_blocks_up_to_their_share(per_token, room):
    """Full forwards of 32 blocks bring 128 tokens."""
    expected = forecast(a_replica(64, prefill_per_token=per_token), DIFFUSION)
    step_ms = 10.0 + 0.5 * (room + min(per_token * room / 4, 512 - room) - 1)
    assert expected.step_ms == pytest.approx(step_ms)
    assert expected.tokens_per_s == pytest.approx(1000 * room / 16 * 4 / step_ms)


def test_memory_bounds_long_blocks_before_short_ones():
    """80 pages of 16 tokens: 12 sequences of 100 and a seed, or 11 with a block of 16."""
    ar, diffusion = (forecast(a_replica(32, num_pages=80), plan) for plan in (AR, DIFFUSION))
    assert ar.tokens_per_s == pytest.approx(1000 * 1280 / 101 / ar.step_ms)
    assert diffusion.tokens_per_s == pytest.approx(1000 * 4 * 1280 / 116 / diffusion.step_ms)


def test_prefill_makes_every_forward_longer_by_what_the_plan_makes_room_for():
    expected = forecast(a_replica(4, prefill_per_token=2.0), SPECULATION)
    assert expected.step_ms == pytest.approx(10.0 + 0.5 * (4 * 8 - 1 + 2.0 * 12))


def test_reading_the_cache_costs_by_sequence():
    step = StepCost((1, 101), (10.0, 60.0), segment_ms=1.0, cached_ms=5.0)
    expected = forecast(a_replica(4, costs=ReplicaCosts(step)), AR)
    assert expected.step_ms == pytest.approx(10.0 + 0.5 * 3 + 3.0 + 5.0 * 0.4)


def test_short_completions_make_long_blocks_worth_less():
    """A prompt's forward for the first token, and a round of two forwards for the other."""
    assert forecast(a_replica(1, mean_completion=2.0), SPECULATION).tokens_per_s == pytest.approx(
        1000 * 2.0 / (3 * 13.5)
    )


def test_a_prompt_has_a_forward_of_its_own_which_counts_most_where_the_rest_takes_few():
    for plan, num_forwards in ((AR, 97), (SPECULATION, 1 + 2 * 96 / 6), (DIFFUSION, 1 + 4 * 96 / 16)):
        expected = forecast(a_replica(3, mean_completion=97.0), plan)
        assert expected.tokens_per_s == pytest.approx(1000 * 3 * 97 / (num_forwards * expected.step_ms))
        assert expected.tpot_s == forecast(a_replica(3), plan).tpot_s


def test_prompts_longer_than_a_step_have_more_forwards():
    load = a_replica(1, mean_completion=11.0, prefill_per_token=3 * 512 / 11)
    expected = forecast(load, AR)
    assert expected.tokens_per_s == pytest.approx(1000 * 11 / (13 * expected.step_ms))


@pytest.mark.parametrize("num", [1, 2, 8, 40])
@pytest.mark.parametrize("turnaround_s", [0.0, 0.005, 0.2, 3.0])
@pytest.mark.parametrize("plan", [AR, SPECULATION, DIFFUSION])
def test_clients_come_back_after_a_while(num, turnaround_s, plan):
    """By Little's law: the requests in flight and the clients between two are all there are."""
    load = a_replica(0, num_between=num, turnaround_s=turnaround_s, mean_completion=50.0)
    expected = forecast(load, plan)
    num_between = expected.tokens_per_s / 50.0 * turnaround_s
    num_waiting = num * expected.tokens_per_s / expected.awaited_tokens_per_s
    assert num_waiting + num_between == pytest.approx(num, rel=0.02)
    if num_waiting >= 1.0:
        in_flight = forecast(a_replica(num_waiting, mean_completion=50.0), plan)
        assert expected.tokens_per_s == pytest.approx(in_flight.tokens_per_s, rel=0.02)


def test_what_clients_take_for_themselves_hides_no_plans_worth():
    """Slow clients get all their plans' tokens late, but wait a third of the time."""
    load = a_replica(1, turnaround_s=5.0, mean_completion=50.0)
    ar, speculation = forecast(load, AR), forecast(load, SPECULATION)
    assert speculation.tokens_per_s < 1.1 * ar.tokens_per_s
    assert speculation.awaited_tokens_per_s > 2.0 * ar.awaited_tokens_per_s


def test_clients_between_two_requests_are_of_the_kinds_in_flight():
    load = a_replica(1, num_running=4, pinned_by_mode={Mode.AR: 3}, num_between=4)
    double = a_replica(2, num_running=8, pinned_by_mode={Mode.AR: 6})
    assert forecast(load, SPECULATION) == forecast(double, SPECULATION)


def test_a_load_without_costs_is_judged_by_the_usual_shape():
    """Memory-bound at first, so blocks win alone; bound by arithmetic later, so they lose to ar."""
    load = a_replica(1, costs=None)
    assert forecast(load, SPECULATION).tokens_per_s > forecast(load, AR).tokens_per_s
    assert forecast(load, SPECULATION, 64).tokens_per_s < forecast(load, AR, 64).tokens_per_s
