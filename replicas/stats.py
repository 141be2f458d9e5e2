"""A replica's measurements of itself: rates over recent seconds, and what its forwards and rounds cost."""

import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from policies.cost import ForwardStats, ReplicaCosts, RoundStats
from policies.cost_estimator import CostEstimator
from policies.failures import Failures
from policies.modes import Mode
from policies.rate_estimator import RateEstimator
from policies.replica_load import ReplicaLoad
from policies.yield_estimator import YieldEstimator
from replicas.engine.engine import Engine

T = TypeVar("T")

WINDOW_S = 2.0
"""The time in which a reading's weight falls to 1/e."""


class DecodingStats:
    """Recent rates of decoding, from counters that only grow.

    clock: seconds
    """

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._seen_s = clock()
        self._num_tokens = 0
        self._num_prefilled = 0
        self._prefilled_per_s = 0.0
        self._tokens: Counter[Mode] = Counter()
        self._forwards: Counter[Mode] = Counter()
        self.tokens_per_s = 0.0
        self.tokens_per_forward: dict[Mode, float] = {}

    @property
    def prefill_per_token(self) -> float:
        """Prompt tokens prefilled for each token generated."""
        return self._prefilled_per_s / self.tokens_per_s if self.tokens_per_s > 1e-6 else 0.0

    def update(
        self, num_tokens: int, num_prefilled: int, tokens: Mapping[Mode, int], forwards: Mapping[Mode, int]
    ) -> None:
        """Takes in totals since the start: num_tokens of all kinds; tokens and forwards of rounds, by
        mode."""
        now_s = self._clock()
        elapsed_s = now_s - self._seen_s
        if elapsed_s <= 0:
            return
        fresh = 1.0 - math.exp(-elapsed_s / WINDOW_S)
        made = Counter(tokens) - self._tokens
        ran = Counter(forwards) - self._forwards
        rate = (num_tokens - self._num_tokens) / elapsed_s
        self.tokens_per_s += fresh * (rate - self.tokens_per_s)
        prefilled = (num_prefilled - self._num_prefilled) / elapsed_s
        self._prefilled_per_s += fresh * (prefilled - self._prefilled_per_s)
        for mode, num_forwards in ran.items():
            ratio = made[mode] / num_forwards
            before = self.tokens_per_forward.get(mode, ratio)
            self.tokens_per_forward[mode] = before + fresh * (ratio - before)
        self._seen_s, self._num_tokens, self._num_prefilled = now_s, num_tokens, num_prefilled
        self._tokens, self._forwards = Counter(tokens), Counter(forwards)


class CostMeter:
    """Learns the costs of forwards and rounds from an engine's two queues, which another thread fills.

    start: the cost from the sweep (replicas.calibration), with factors and yields known before; what
      forecasts by it left out is RateEstimator's to learn, and no part of what this gives
    clock: seconds

    A reading that the estimators can't take leaves what was learned as it was.
    """

    def __init__(
        self,
        start: ReplicaCosts,
        forwards: deque[ForwardStats],
        rounds: deque[RoundStats],
        clock: Callable[[], float],
    ):
        self._clock = clock
        self._forwards = forwards
        self._rounds = rounds
        self._step = CostEstimator(start.step, clock(), start.factors)
        self._yields = YieldEstimator(clock(), start.yields)
        self._step_failures = Failures("learning what forwards cost")
        self._yield_failures = Failures("learning what rounds bring")
        self._costs = replace(start, left_out=0.0, rates={})

    def update(self) -> ReplicaCosts:
        """Takes what has come since the last call into account. Never raises."""
        now_s = self._clock()
        forwards, rounds = list(_taken(self._forwards)), list(_taken(self._rounds))
        with self._step_failures:
            self._step.update([forward for forward in forwards if forward.ms > 0], now_s)
            self._costs = replace(self._costs, step=self._step.cost, factors=self._step.factors)
        with self._yield_failures:
            self._yields.update(rounds, now_s)
            self._costs = replace(self._costs, yields=self._yields.yields())
        return self._costs


def _taken(queue: deque[T]) -> Iterator[T]:
    while True:
        try:
            yield queue.popleft()
        except IndexError:
            return


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """An engine's load and totals since its start at one moment, for other threads to read."""

    load: ReplicaLoad
    made_by_mode: Mapping[Mode, int]
    """All tokens."""
    num_prefilled: int
    tokens_by_mode: Mapping[Mode, int]
    """Tokens of rounds."""
    forwards_by_mode: Mapping[Mode, int]
    """Forwards of rounds."""
    num_tried: int
    """Forwards in trials."""

    @classmethod
    def read(cls, engine: Engine, replica_id: str) -> "EngineSnapshot":
        """Reads it off the engine. Called on the engine's thread."""
        counters = engine.scheduler.counters
        return cls(
            engine.snapshot(replica_id),
            dict(counters.made_by_mode),
            counters.num_prefilled,
            dict(counters.tokens_by_mode),
            dict(counters.forwards_by_mode),
            engine.scheduler.trials.num_forwards,
        )

    @property
    def num_tokens(self) -> int:
        return sum(self.made_by_mode.values())


class LoadMeter:
    """Measures the load that a replica publishes. Not on the engine's thread, but on one other alone.

    costs: as first measured and known; None publishes none
    clock: seconds
    """

    def __init__(self, engine: Engine, clock: Callable[[], float], costs: ReplicaCosts | None):
        self._stats = DecodingStats(clock)
        self._stats_failures = Failures("averaging rates")
        self._clock = clock
        self._rates = RateEstimator(clock(), None if costs is None else costs.rates)
        self._rate_failures = Failures("comparing rates with forecasts")
        self._published = costs
        self._costs = None
        if costs is not None:
            self._costs = CostMeter(costs, engine.forwards, engine.scheduler.counters.rounds, clock)

    @property
    def costs(self) -> ReplicaCosts | None:
        """The costs as last published."""
        return self._published

    def measure(self, snapshot: EngineSnapshot, silent_s: float) -> ReplicaLoad:
        """The load to publish, with rates since the last one. Never raises: what can't be learned is left as
        it was.

        silent_s: the time for which the engine has not come to a safe point.
        """
        with self._stats_failures:
            self._stats.update(
                snapshot.num_tokens,
                snapshot.num_prefilled,
                snapshot.tokens_by_mode,
                snapshot.forwards_by_mode,
            )
        load = replace(
            snapshot.load,
            tokens_per_s=self._stats.tokens_per_s,
            tokens_per_forward=dict(self._stats.tokens_per_forward),
            prefill_per_token=self._stats.prefill_per_token,
            costs=None if self._costs is None else self._costs.update(),
            tokens_total_by_mode=snapshot.made_by_mode,
            silent_s=silent_s,
        )
        if load.costs is not None:
            self._published = self._with_rates(load, load.costs, snapshot)
            load = replace(load, costs=self._published)
        return load

    def _with_rates(self, load: ReplicaLoad, costs: ReplicaCosts, snapshot: EngineSnapshot) -> ReplicaCosts:
        """The costs with what forecasts by them have left out."""
        with self._rate_failures:
            self._rates.update(load, snapshot.num_tokens, snapshot.num_tried, self._clock())
            return replace(costs, left_out=self._rates.common, rates=self._rates.factors)
        last = self._published or costs
        return replace(costs, left_out=last.left_out, rates=last.rates)
