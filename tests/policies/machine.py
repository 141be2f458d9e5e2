"""A machine that runs one replica's forwards, with a pace that is disturbed, and all that learns from them.

The engine is a loop of whole forwards of one plan; trials, estimators, policy and `stabilise` are real.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from policies.cost import ForwardStats, ReplicaCosts, RoundStats, StepCost
from policies.cost_estimator import CostEstimator
from policies.cost_fit import knots_up_to
from policies.forecast import forecast
from policies.modes import DecodePlan, Mode
from policies.policy import Snapshot
from policies.registry import create_policy
from policies.replica_load import ReplicaLoad
from policies.yield_estimator import YieldEstimator
from replicas.engine.sequence import ActivePlan
from replicas.engine.trials import Trials

PERIOD_S = 0.2
MAX_STEP_TOKENS = 512
CONTEXT = 100
KNOTS = knots_up_to(MAX_STEP_TOKENS)
AR = DecodePlan(Mode.AR)
PLANS = (AR, *(DecodePlan(Mode.SELF_SPECULATION, block) for block in (4, 8, 16, 32)))

Pace = Callable[[float], float]


@dataclass
class Machine:
    """What forwards and drafts truly are there.

    pace: the factor on every forward at a time. num_requests: in flight at a time.
    factors: what a mode's forwards take beside the shape, which is all that the replica's sweep has seen.
    """

    pace: Pace = lambda _: 1.0
    num_requests: Callable[[float], int] = lambda now_s: 4 if now_s < 30 else 64
    shape: StepCost = field(default_factory=lambda: StepCost(KNOTS, tuple(4.0 + 0.03 * q for q in KNOTS)))
    factors: dict[Mode, float] = field(default_factory=dict)
    acceptance: float = 0.8
    noise: float = 0.1

    def share_without_draft(self, plan: DecodePlan) -> float:
        """The share of rounds of self-speculation that verify nothing: one after each refusal."""
        refused = 1.0 - self.acceptance ** (plan.block_length - 1)
        return refused / (1.0 + refused)

    def forward_ms(self, plan: DecodePlan, num: int) -> tuple[int, int, float]:
        """The query tokens and segments of a forward of so many requests, and its latency."""
        each = 1.0
        if plan.mode is Mode.SELF_SPECULATION:
            without = self.share_without_draft(plan)
            each = without * (1 + plan.block_length) + (1.0 - without) * 2 * plan.block_length
        segments = min(num, int(MAX_STEP_TOKENS / each))
        rows = round(segments * each)
        return rows, segments, self.factors.get(plan.mode, 1.0) * self.shape.ms(rows)

    def round_of(self, plan: DecodePlan, rng: random.Random) -> RoundStats:
        """A round of self-speculation."""
        if rng.random() < self.share_without_draft(plan):
            return RoundStats(plan, 1, 1, 1 + plan.block_length)
        tokens = 1
        while tokens < plan.block_length and rng.random() < self.acceptance:
            tokens += 1
        return RoundStats(plan, tokens, 1, 2 * plan.block_length)

    def rate(self, plan: DecodePlan, num: int) -> float:
        """Tokens a second of a plan at a pace of 1."""
        _, segments, ms = self.forward_ms(plan, num)
        tokens = 1.0
        if plan.mode is Mode.SELF_SPECULATION:
            without = self.share_without_draft(plan)
            tokens = without + (1.0 - without) * sum(self.acceptance**n for n in range(plan.block_length))
        return 1000.0 * segments / ms * tokens

    def best(self, num: int) -> float:
        return max(self.rate(plan, num) for plan in PLANS)


@dataclass
class Period:
    """One control period of a run."""

    at_s: float
    num: int
    plan: DecodePlan
    """In force."""
    share: float
    """The tokens of the plan in force, as a share of those of the best."""
    lost: float
    """The share of the best plan's tokens that was lost, trials included."""
    foretold: dict[DecodePlan, float]
    """Tokens a second foretold, by plan."""


def run(machine: Machine, seconds: float, seed: int = 0, **parameters: object) -> list[Period]:
    rng = random.Random(seed)
    step, yields, trials = CostEstimator(machine.shape, 0.0), YieldEstimator(0.0), Trials(True)
    policy = create_policy("cost_model", {"quality": "lossless", **parameters})
    state, plan, now_s = policy.resume(None, 0.0, 0.0), None, 0.0
    periods = []
    while now_s < seconds:
        num = machine.num_requests(now_s)
        costs = ReplicaCosts(step.cost, yields.yields(), step.factors)
        load = ReplicaLoad(
            "r",
            num,
            0,
            num,
            max_running=64,
            pages_used=0,
            num_pages=100_000,
            modes=(Mode.AR, Mode.SELF_SPECULATION),
            costs=costs,
            mean_context=CONTEXT,
            mean_remaining=100.0,
        )
        before = plan
        decision, state = policy.decide(Snapshot(load, plan), state, now_s)
        plan = decision.decode
        if plan != before:
            trials.stop()
        trials.wanted = policy.trial(load, plan)
        forwards, rounds, lost, ends_s = [], [], 0.0, now_s + PERIOD_S
        while now_s < ends_s:
            trials.step(now_s)
            ran = trials.plan(ActivePlan(plan, "")).decode
            rows, segments, ms = machine.forward_ms(ran, num)
            ms *= machine.pace(now_s) * math.exp(rng.gauss(0.0, machine.noise))
            forwards.append(ForwardStats(rows, segments, CONTEXT * segments, ms, ran.mode))
            if ran.mode is Mode.SELF_SPECULATION:
                rounds += [machine.round_of(ran, rng) for _ in range(segments)]
            lost += ms / 1000.0 * (1.0 - machine.rate(ran, num) / machine.best(num))
            now_s += ms / 1000.0
        step.update(forwards, now_s)
        yields.update(rounds, now_s)
        foretold = {other: forecast(load, other).tokens_per_s for other in PLANS}
        elapsed_s = now_s - ends_s + PERIOD_S
        share = machine.rate(plan, num) / machine.best(num)
        periods.append(Period(now_s, num, plan, share, lost / elapsed_s, foretold))
    return periods
