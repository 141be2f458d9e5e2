"""The estimator of what rounds bring, by plan, which learns from every round and forgets.

It starts from the yields measured of this checkpoint before, where there are any, else from priors, and goes
back to them as rounds age.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from policies.cost import PRIOR_ACCEPTANCE, RoundStats, RoundYield, prior_yield
from policies.cost_fit import MAX_COUNTED
from policies.modes import MAX_BLOCK_LENGTH, DecodePlan, Mode

Vector = NDArray[np.float64]

HALF_LIFE_S = 60.0
"""The time after which a round counts for half."""
MAX_ROUNDS = 300.0
"""The number of rounds past which the older ones count less, however fast they came."""
PRIOR_ROUNDS = 3.0
"""The number of measured rounds that a prior counts for."""
KNOWN_ROUNDS = 12.0
"""The number of rounds that a yield known at the start counts for: its workload may have been another."""
SPECULATION_BLOCKS = (4, 8, 16, 32)
"""The blocks of self-speculation whose yield is published once any of its blocks ran."""
MAX_PLANS = 16
"""The number of diffusion plans counted at once, and so published; past it those of the fewest rounds go."""


_NO_ROUNDS = np.zeros(4)
_SPECULATION_PLANS = {
    block: DecodePlan(Mode.SELF_SPECULATION, block) for block in range(2, MAX_BLOCK_LENGTH + 1)
}


class YieldEstimator:
    """Estimates the tokens and forwards of a round, by plan.

    Self-speculation is one curve for all blocks: the chance that the request takes one more token after j
    of them (a product-limit estimate, so a round tells of every shorter block too, and a longer one is
    extrapolated). Diffusion is counted by block and threshold, and only of plans that a policy may choose:
    clients may name any number of others.
    known: the yields to start from.
    """

    def __init__(self, now_s: float, known: Iterable[RoundYield] = ()):
        self._now_s = now_s
        self._known = {entry.plan: entry for entry in known if entry.plan.mode is not Mode.AR}
        self._known_chances = _chances(self._known.values())
        self._reached = np.zeros(MAX_BLOCK_LENGTH)  # rounds that had taken j tokens and drafted one more
        self._passed = np.zeros(MAX_BLOCK_LENGTH)  # those of them that took it
        self._by_block = np.zeros(MAX_BLOCK_LENGTH + 1)
        self._chosen_blocks = np.zeros(MAX_BLOCK_LENGTH + 1)  # of these rounds, those that no client chose
        self._diffusion: dict[DecodePlan, Vector] = {}  # rounds, tokens, forwards, rows

    def update(self, rounds: Iterable[RoundStats], now_s: float) -> None:
        """Learns from the rounds since the last call."""
        self._forget(0.5 ** (max(0.0, now_s - self._now_s) / HALF_LIFE_S))
        self._now_s = now_s
        for made in rounds:
            if not all(0 < count <= MAX_COUNTED for count in (made.tokens, made.forwards, made.rows)):
                continue
            if made.plan.mode is Mode.SELF_SPECULATION:
                block = made.plan.block_length
                self._reached[1 : min(made.tokens, block - 1) + 1] += 1
                self._passed[1 : made.tokens] += 1
                self._by_block[block] += 1
                self._chosen_blocks[block] += not made.is_clients
            elif made.plan.mode is Mode.DIFFUSION and not made.is_clients:
                sums = self._diffusion.setdefault(made.plan, np.zeros(4))
                sums += (1.0, made.tokens, made.forwards, made.rows)
        if len(self._diffusion) > MAX_PLANS:
            most = sorted(self._diffusion, key=lambda plan: -self._diffusion[plan][0])[:MAX_PLANS]
            self._diffusion = {plan: self._diffusion[plan] for plan in most}

    def yields(self) -> tuple[RoundYield, ...]:
        """Returns the yields of plans that ran, and of self-speculation's usual blocks once it ran at all."""
        more = self._against_priors()
        known = (plan for plan in self._known if plan.mode is Mode.DIFFUSION)
        plans = dict.fromkeys((*self._diffusion, *known))
        return (*self._speculation(), *(self._counted(plan, *more) for plan in plans))

    def _prior(self, plan: DecodePlan) -> tuple[RoundYield, float]:
        """Returns what is expected of a plan without any round, and the rounds that this counts for."""
        known = self._known.get(plan)
        return (prior_yield(plan), PRIOR_ROUNDS) if known is None else (known, KNOWN_ROUNDS)

    def _forget(self, share: float) -> None:
        many = min(1.0, MAX_ROUNDS / max(1.0, float(self._by_block.sum())))
        for counts in (self._reached, self._passed, self._by_block, self._chosen_blocks):
            counts *= share * many
        for plan, sums in list(self._diffusion.items()):
            sums *= share * min(1.0, MAX_ROUNDS / max(1.0, sums[0]))
            if sums[0] < 0.01:
                del self._diffusion[plan]

    def _speculation(self) -> Iterable[RoundYield]:
        if self._by_block.sum() < 0.01 and not self._known_chances:
            return
        chance, reaches, tokens = PRIOR_ACCEPTANCE, 1.0, [0.0, 1.0]
        counts = zip(self._passed[1:].tolist(), self._reached[1:].tolist(), strict=True)
        for place, (passed, reached) in enumerate(counts):
            weight = PRIOR_ROUNDS
            if place < len(self._known_chances):
                chance, weight = self._known_chances[place], KNOWN_ROUNDS
            chance = (passed + weight * chance) / (reached + weight)
            reaches *= chance
            tokens.append(tokens[-1] + reaches)
        ran = {int(block) for block in np.flatnonzero(self._chosen_blocks > 0.5)}
        at_least = np.cumsum(self._by_block[::-1])[::-1].tolist()
        for block in sorted(ran.union(SPECULATION_BLOCKS)):
            known = KNOWN_ROUNDS if block <= len(self._known_chances) + 1 else 0.0
            yield RoundYield(
                _SPECULATION_PLANS[block], round(tokens[block], 4), 2.0, round(at_least[block] + known, 2)
            )

    def _counted(self, plan: DecodePlan, more_tokens: float, more_forwards: float) -> RoundYield:
        """Returns a diffusion plan's yield, its prior times these ratios counting as some rounds more."""
        prior, weight = self._prior(plan)
        num_rounds, tokens, forwards, rows = self._diffusion.get(plan, _NO_ROUNDS).tolist()
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
        )

    def _against_priors(self) -> tuple[float, float]:
        """Returns all diffusion's tokens and forwards as ratios to its priors, with one round of ratio 1."""
        made, expected = np.ones(2), np.ones(2)
        for plan, (num_rounds, tokens, forwards, _) in self._diffusion.items():
            prior, _ = self._prior(plan)
            made += tokens / prior.tokens, forwards / prior.forwards
            expected += num_rounds
        more_tokens, more_forwards = made / expected
        return float(more_tokens), float(more_forwards)


def _chances(known: Iterable[RoundYield]) -> list[float]:
    """Returns the chance that one token more is taken, after 1, 2, ... of them, by what blocks bring.

    Between two blocks it is one number, by which the longer brings what it does.
    """
    chances: list[float] = []
    reaches, block, tokens = 1.0, 1, 1.0
    for entry in sorted(known, key=lambda entry: entry.plan.block_length):
        if entry.plan.mode is Mode.SELF_SPECULATION:
            length, more = entry.plan.block_length - block, max(0.0, entry.tokens - tokens)
            chance = _chance(more / reaches, length) if reaches > 0.0 else 0.0
            chances += [chance] * length
            reaches *= chance**length
            block, tokens = entry.plan.block_length, entry.tokens
    return chances


def _chance(total: float, length: int) -> float:
    """Returns the p at which p + p^2 + ... + p^length is so much, at most 1."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**n for n in range(1, length + 1)) < total else (low, middle)
    return (low + high) / 2
