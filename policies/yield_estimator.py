"""The estimator of what rounds bring, by plan, which learns from every round and forgets.

It starts from the yields measured of this checkpoint before, where there are any, else from priors, and goes
back to them as rounds age.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from policies.cost import RoundStats, RoundYield, prior_yield
from policies.cost_fit import MAX_COUNTED
from policies.modes import DecodePlan, Mode

Vector = NDArray[np.float64]

HALF_LIFE_S = 60.0
"""The time after which a round counts for half."""
MAX_ROUNDS = 600.0
"""The number of rounds past which the older ones count less, however fast they came."""
PRIOR_ROUNDS = 3.0
"""The number of measured rounds that a prior counts for."""
KNOWN_ROUNDS = 12.0
"""The number of rounds that a yield known at the start counts for: its workload may have been another."""
MAX_PLANS = 16
"""The number of plans counted at once, and so published; past it those of the fewest rounds go."""

_NO_ROUNDS = np.zeros(4)


class YieldEstimator:
    """Estimates the tokens, forwards and rows of a round, by plan.

    Rounds are counted by plan, and only of plans that a policy may choose: clients may name any number of
    others.
    known: the yields to start from.
    """

    def __init__(self, now_s: float, known: Iterable[RoundYield] = ()):
        self._now_s = now_s
        self._known = {entry.plan: entry for entry in known if entry.plan.mode is not Mode.AR}
        self._counts: dict[DecodePlan, Vector] = {}  # rounds, tokens, forwards, rows

    def update(self, rounds: Iterable[RoundStats], now_s: float) -> None:
        """Learns from the rounds since the last call."""
        self._forget(0.5 ** (max(0.0, now_s - self._now_s) / HALF_LIFE_S))
        self._now_s = now_s
        for made in rounds:
            if not all(0 < count <= MAX_COUNTED for count in (made.tokens, made.forwards, made.rows)):
                continue
            if made.plan.mode is not Mode.AR and not made.is_clients:
                sums = self._counts.setdefault(made.plan, np.zeros(4))
                sums += (1.0, made.tokens, made.forwards, made.rows)
        if len(self._counts) > MAX_PLANS:
            most = sorted(self._counts, key=lambda plan: -self._counts[plan][0])[:MAX_PLANS]
            self._counts = {plan: self._counts[plan] for plan in most}

    def yields(self) -> tuple[RoundYield, ...]:
        """Returns the yields of plans that ran, and of those known at the start."""
        plans = dict.fromkeys((*self._counts, *self._known))
        more = {mode: self._against_priors(mode) for mode in {plan.mode for plan in plans}}
        return tuple(self._counted(plan, *more[plan.mode]) for plan in plans)

    def _prior(self, plan: DecodePlan) -> tuple[RoundYield, float]:
        """Returns what is expected of a plan without any round, and the rounds that this counts for."""
        known = self._known.get(plan)
        return (prior_yield(plan), PRIOR_ROUNDS) if known is None else (known, KNOWN_ROUNDS)

    def _forget(self, share: float) -> None:
        for plan, sums in list(self._counts.items()):
            sums *= share * min(1.0, MAX_ROUNDS / max(1.0, sums[0]))
            if sums[0] < 0.01:
                del self._counts[plan]

    def _counted(self, plan: DecodePlan, more_tokens: float, more_forwards: float) -> RoundYield:
        """Returns a plan's yield, its prior times these ratios counting as some rounds more."""
        prior, weight = self._prior(plan)
        num_rounds, tokens, forwards, rows = self._counts.get(plan, _NO_ROUNDS).tolist()
        if plan in self._known:
            rows += weight * prior.forwards * prior.rows_per_forward
            rows_per_forward = rows / (forwards + weight * prior.forwards)
        else:
            rows_per_forward = rows / forwards
        tokens += weight * prior.tokens * more_tokens
        forwards += weight * prior.forwards * more_forwards
        total = num_rounds + weight
        return RoundYield(
            plan,
            max(1e-4, round(tokens / total, 4)),
            max(1e-4, round(forwards / total, 4)),
            round(num_rounds + (weight if plan in self._known else 0.0), 2),
            max(0.01, round(rows_per_forward, 2)),
            prior.differing,
            prior.right,
        )

    def _against_priors(self, mode: Mode) -> tuple[float, float]:
        """Returns all of a mode's tokens and forwards as ratios to its priors, with one round of ratio 1."""
        made, expected = np.ones(2), np.ones(2)
        for plan, (num_rounds, tokens, forwards, _) in self._counts.items():
            if plan.mode is mode:
                prior, _ = self._prior(plan)
                made += tokens / prior.tokens, forwards / prior.forwards
                expected += num_rounds
        more_tokens, more_forwards = made / expected
        return float(more_tokens), float(more_forwards)
