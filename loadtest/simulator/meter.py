"""The measurements that a simulated replica takes of itself, as it publishes them."""

import math
from collections.abc import Mapping, Sequence

from policies.cost import RoundYield
from policies.modes import DecodePlan

YIELD_MEMORY_S = 3.0
"""Time constant with which the estimate of a yield follows what is seen."""
RATE_MEMORY_S = 2.0
MAX_ROUNDS = 1000.0
EXPLORED_WEIGHT = 0.2
"""The weight of one exploration's outcome, against what was believed before."""
OUTPUT_MEMORY = 50.0
"""Requests over which the mean length of completions is taken."""


class Meter:
    """Running estimates of a replica's rates and yields.

    A plan that neither runs nor is explored keeps its last estimate. yields: believed before any was seen.
    """

    def __init__(self, yields: Mapping[DecodePlan, RoundYield]):
        self.tokens_per_s = 0.0
        self.prefill_per_token = 0.0
        self.mean_output = math.inf
        self._yields = dict(yields)
        self._at_s = 0.0
        self._elapsed_s = 0.0
        self._made = 0.0
        self._prefilled = 0.0

    @property
    def yields(self) -> tuple[RoundYield, ...]:
        return tuple(self._yields.values())

    def ended(self, output: int) -> None:
        """Notes a request that ended after `output` tokens."""
        if self.mean_output == math.inf:
            self.mean_output = float(output)
        self.mean_output += (output - self.mean_output) / OUTPUT_MEMORY

    def look(self, now_s: float, made: float, prefilled: float) -> None:
        """Takes the rates since the last look. made, prefilled: tokens since the start."""
        self._elapsed_s = now_s - self._at_s
        if self._elapsed_s <= 0:
            return
        fresh = 1.0 - math.exp(-self._elapsed_s / RATE_MEMORY_S)
        tokens, prompts = made - self._made, prefilled - self._prefilled
        self.tokens_per_s += fresh * (tokens / self._elapsed_s - self.tokens_per_s)
        if tokens > 0 or prompts > 0:
            self.prefill_per_token += fresh * (prompts / max(1.0, tokens) - self.prefill_per_token)
        self._at_s, self._made, self._prefilled = now_s, made, prefilled

    def saw(self, plan: DecodePlan, running: Sequence[tuple[float, float]]) -> None:
        """Learns from requests that have run the plan since the last look.

        running: tokens and rows a forward of each
        """
        if not running or plan.block_length == 1 or self._elapsed_s <= 0:
            return
        self._learn(plan, running, 1.0 - math.exp(-self._elapsed_s / YIELD_MEMORY_S))

    def explored(self, plan: DecodePlan, tried: Sequence[tuple[float, float]]) -> None:
        """Learns from a few requests that explored a plan not in force: tokens and rows a forward of each."""
        if tried and plan.block_length > 1:
            self._learn(plan, tried, EXPLORED_WEIGHT)

    def _learn(self, plan: DecodePlan, seen: Sequence[tuple[float, float]], weight: float) -> None:
        known = self._yields[plan]
        pace, rows = (sum(values) / len(seen) for values in zip(*seen, strict=True))
        self._yields[plan] = RoundYield(
            plan,
            known.tokens + weight * (pace * known.forwards - known.tokens),
            known.forwards,
            min(MAX_ROUNDS, known.num_rounds + len(seen)),
            known.rows_per_forward + weight * (rows - known.rows_per_forward),
        )
