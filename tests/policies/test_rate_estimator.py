import math
import random
from dataclasses import replace

import pytest

from policies.cost import ReplicaCosts, StepCost
from policies.forecast import forecast
from policies.modes import DecodePlan, Mode
from policies.rate_estimator import SPAN_S, RateEstimator
from tests.policies.helpers import a_load

AR = DecodePlan(Mode.AR)
SPECULATION = DecodePlan(Mode.SELF_SPECULATION, 8)
COSTS = ReplicaCosts(StepCost((1, 512), (5.0, 50.0)))


class Served:
    """A replica whose rates are what is foretold, times factors."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = random.Random(seed)
        self.estimator = RateEstimator(0.0)
        self.now_s = 0.0
        self.num_tokens = 0.0
        self.num_tried = 0

    def serve(self, plan: DecodePlan, num: int, seconds: float, factor: float = 1.0, **changes) -> None:
        load = a_load(num, costs=COSTS, decode=plan, **{"max_running": 64, "num_pages": 9999, **changes})
        for _ in range(round(seconds / 0.2)):
            self.now_s += 0.2
            rate = forecast(load, plan).tokens_per_s * factor * self.rng.gauss(1.0, 0.1)
            self.num_tokens += 0.2 * rate
            self.estimator.update(load, round(self.num_tokens), self.num_tried, self.now_s)

    def foretold(self, plan: DecodePlan, num: int) -> float:
        """The rate foretold over the one by step costs and yields alone."""
        load = a_load(num, costs=COSTS, max_running=64, num_pages=9999)
        costs = replace(COSTS, left_out=self.estimator.common, rates=self.estimator.factors)
        return forecast(replace(load, costs=costs), plan).tokens_per_s / forecast(load, plan).tokens_per_s


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.3])
def test_what_all_forecasts_leave_out_is_common_and_soon_seen(factor):
    """The time between two requests of a client, say: it holds for plans that do not run, too."""
    served = Served()
    served.serve(SPECULATION, 4, 5.0, factor)
    assert served.foretold(SPECULATION, 4) == pytest.approx(factor, rel=0.1)
    assert served.foretold(AR, 4) == pytest.approx(factor, rel=0.15)


def test_a_client_that_is_between_two_requests_is_in_the_forecast_and_not_left_out():
    """Of two looks one finds nothing in flight, though tokens were made: half the time is the client's."""
    served = Served()
    of_client = {"costs": COSTS, "decode": SPECULATION, "num_pages": 9999, "mean_completion": 60.0}
    alone_s = 60.0 / forecast(a_load(1, **of_client), SPECULATION).tokens_per_s
    busy = a_load(1, turnaround_s=alone_s, **of_client)
    between = a_load(0, num_between=1, turnaround_s=alone_s, **of_client)
    for number in range(100):
        served.now_s += 0.2
        served.num_tokens += 0.2 * 60.0 / (2 * alone_s)
        served.estimator.update(between if number % 2 else busy, round(served.num_tokens), 0, served.now_s)
    assert served.foretold(SPECULATION, 1) == pytest.approx(1.0, rel=0.05)
    assert served.foretold(AR, 1) == pytest.approx(1.0, rel=0.1)


def test_what_one_mode_leaves_out_is_learned_by_load_and_lasts():
    served = Served()
    for _ in range(6):
        served.serve(AR, 64, 10.0, 0.7)
        served.serve(SPECULATION, 64, 10.0)
    ratio = served.foretold(AR, 64) / served.foretold(SPECULATION, 64)
    assert ratio == pytest.approx(0.75, abs=0.08)
    far = served.foretold(AR, 1) / served.foretold(SPECULATION, 1)
    assert ratio < far < 1.0
    served.serve(SPECULATION, 64, 60.0)
    assert served.foretold(AR, 64) / served.foretold(SPECULATION, 64) == pytest.approx(ratio, abs=0.07)


def test_a_slow_spell_while_one_mode_runs_is_not_booked_on_it():
    served = Served()
    served.serve(AR, 64, 20.0)
    served.serve(AR, 64, 8.0, 0.25)
    served.serve(SPECULATION, 64, 5.0)
    assert served.foretold(AR, 64) / served.foretold(SPECULATION, 64) == pytest.approx(1.0, abs=0.12)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_auto": 2, "pinned_by_mode": {Mode.AR: 2}},
        {"num_auto": 0, "pinned_by_mode": {Mode.AR: 4}},
    ],
)
def test_what_pinned_requests_make_tells_of_no_plan(changes):
    served = Served()
    served.serve(SPECULATION, 4, 10.0, 0.5, **changes)
    assert (served.estimator.common, served.estimator.factors) == (0.0, {})


def test_diffusion_of_lossless_requests_is_none():
    served = Served()
    served.serve(DecodePlan(Mode.DIFFUSION, 16), 4, 10.0, 0.5, num_lossless=1)
    assert served.estimator.factors == {}


def test_spans_with_a_trial_a_shift_or_silence_in_them_do_not_count():
    served = Served()
    for number in range(50):
        served.num_tried = number
        served.serve(SPECULATION, 4, SPAN_S - 0.2, 0.5)
    for number in range(50):
        served.serve((AR, SPECULATION)[number % 2], 4, SPAN_S, 0.5)
    for _ in range(20):
        served.now_s += 10.0
        served.serve(SPECULATION, 4, SPAN_S - 0.2, 0.5)
    served.serve(SPECULATION, 0, 10.0, 0.0)
    assert served.estimator.factors == {}


def test_no_token_at_all_is_no_rate():
    served = Served()
    served.serve(SPECULATION, 4, 10.0, 0.0)
    assert served.estimator.factors == {}
    served.serve(SPECULATION, 4, 5.0)
    assert math.isfinite(served.estimator.common)


@pytest.mark.parametrize("step_s", [0.05, 0.3, 0.5, 0.7, 1.0, 2.0])
def test_a_forecast_that_is_right_stays_so_however_long_a_step_takes(step_s):
    """In most looks nothing was made, and then all of a step at once."""
    costs = ReplicaCosts(StepCost((1, 512), (1000.0 * step_s, 1000.0 * step_s)))
    load = a_load(4, costs=costs, decode=AR, max_running=64, num_pages=9999)
    estimator = RateEstimator(0.0)
    rate = forecast(load, AR).tokens_per_s * step_s
    for look in range(1, 3001):
        estimator.update(load, round(rate * int(0.2 * look / step_s + 1e-9)), 0, 0.2 * look)
    learned = math.exp(estimator.common) * estimator.factors[Mode.AR].at(4)[0]
    assert learned == pytest.approx(1.0, rel=0.1)
