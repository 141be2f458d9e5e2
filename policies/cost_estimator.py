"""Estimators of a replica's costs, which learn from a sweep at its start, then from every forward and round.

Both estimators forget, so that a machine that slows down or a workload that changes is followed, and
neither believes a single odd measurement.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from policies.cost import ForwardStats, RoundStats, RoundYield, StepCost, prior_yield
from policies.modes import DecodePlan, Mode

Vector = NDArray[np.float64]

SMOOTHNESS = 0.3
"""The weight of a bend in the fitted line, against a measurement's relative error."""
MEASUREMENT_NOISE = 0.1
"""The standard deviation of one forward's latency, relative to it."""
MOST_ODD = 6.0
"""The number of outliers, less one for every two other measurements since, past which the estimate is odd
and not they: each cost is then taken to be as unknown as it is large."""
OUTLIER = 3.0
"""The number of standard deviations at which a larger error is cut off."""
MOST_CHANGE = 0.3
"""The largest share by which one measurement lengthens a forward like it, or shortens any cost. Latencies
err upwards by any factor; and costs drift in proportion, so one taken to zero would stay there."""
DRIFT_COMMON = 0.1
"""The relative drift of all costs together in a second (its square grows with time), by which one mode's
forwards can tell of a machine that slows down for all modes."""
DRIFT_OWN = 0.03
"""The relative drift of each cost alone in a second (its square grows with time)."""
UNSURE_COMMON = 0.2
"""The relative uncertainty of all costs together, in the first estimate and at most after any silence: the
first forward after one is often slow, which tells nothing of the next."""
UNSURE_OWN = 0.1
"""The relative uncertainty of each cost alone, in the first estimate and at most after any silence."""
LEAST_INCREMENT = 0.01
"""The least size, as a share of the base latency, from which a cost's own drift and uncertainty are
computed, so that a cost fitted as zero is not lost."""

OWN_DRIFT = 0.2
"""The factor on the drift of a mode's own costs, so that its last moments are not all that is believed of
it while another mode runs."""
REMEMBERED_S = 60.0
"""The time for which a mode's own costs are believed after it last ran in force."""
HALF_LIFE_S = 60.0
"""The time after which a round counts for half."""
MAX_ROUNDS = 300.0
"""The number of rounds past which the older ones count less, however fast they came."""
PRIOR_ROUNDS = 3.0
"""The number of measured rounds that a prior counts for."""
MAX_PLANS = 32
"""The number of diffusion plans counted at once, and so published; past it those of the fewest rounds go."""
LEAST_MS = 1e-3
"""The shortest time that a forward is believed to take, so that rounding leaves something of each cost."""
SOUND_MS = (1e-6, 1e7)
"""The shortest and the longest latency, in ms, of a forward that counts: others are measuring errors."""
MOST_COUNTED = 10**9
"""The largest number of tokens in a forward, or of anything in a round, that counts."""


def knots_up_to(max_tokens: int) -> tuple[int, ...]:
    """Returns the powers of two up to the first that is at least max_tokens."""
    return tuple(2**power for power in range((max_tokens - 1).bit_length() + 1))


def fit_step_cost(forwards: Sequence[ForwardStats], knots: tuple[int, ...]) -> StepCost:
    """Fits a StepCost by least relative squares, robust (Huber's weights) and with no negative cost.

    Between knots that were not measured the line is as straight as the others let it be.
    Raises ValueError without any forward.
    """
    forwards = [forward for forward in forwards if _is_sound(forward)]
    if not forwards:
        raise ValueError("no forwards to fit a cost to")
    costs = np.array([forward.ms for forward in forwards])
    rows = np.stack([_features(forward, knots) for forward in forwards]) / costs[:, None]
    bends = SMOOTHNESS * _bends(knots) / float(np.median(costs))
    weights = np.ones(len(costs))
    fitted = np.zeros(rows.shape[1])
    for _ in range(6):
        weighted = rows * weights[:, None]
        fitted = _least_squares(weighted.T @ rows + bends.T @ bends, weighted.sum(axis=0), fitted)
        errors = np.abs(1.0 - rows @ fitted)
        scale = max(1.4826 * float(np.median(errors)), 0.01)
        weights = np.minimum(1.0, 1.5 * scale / np.maximum(errors, 1e-9))
    return _step_cost(fitted, knots)


class StepCostEstimator:
    """Estimates a StepCost by a Kalman filter over its parameters.

    start: the first estimate, by fit_step_cost or a prior. now_s: any clock that moves forward, the
    same one for all calls. drift: a factor on the usual drift; the smaller, the longer it averages.
    """

    def __init__(self, start: StepCost, now_s: float, drift: float = 1.0):
        self._drift_common, self._drift_own = DRIFT_COMMON * drift, DRIFT_OWN * drift
        self._knots = start.knots
        self._costs = _parameters(start)
        self._now_s = now_s
        self._covariance = self._spread(UNSURE_COMMON, UNSURE_OWN)
        self._num_odd = 0.0
        self.cost = start

    def update(self, forwards: Iterable[ForwardStats], now_s: float) -> None:
        """Learns from the forwards since the last call; like ones are represented by their median."""
        self._drift(max(0.0, now_s - self._now_s))
        self._now_s = now_s
        alike: defaultdict[tuple[int, int], list[ForwardStats]] = defaultdict(list)
        for forward in filter(_is_sound, forwards):
            alike[forward.num_tokens.bit_length(), forward.num_segments.bit_length()].append(forward)
        for group in alike.values():
            group.sort(key=lambda forward: forward.ms)
            self._learn(group[len(group) // 2], len(group))
        if not (np.isfinite(self._costs).all() and np.isfinite(self._covariance).all()):
            # Begins again from what it last believed: arithmetic that has overflowed never recovers.
            self._costs = _parameters(self.cost)
            self._covariance = self._spread(UNSURE_COMMON, 1.0)
        if alike:
            self.cost = _step_cost(self._costs, self._knots)

    def _spread(self, common: float, own: float) -> Vector:
        """Returns the covariance of costs that vary by these shares, all together and each on its own."""
        least = np.maximum(self._costs, LEAST_INCREMENT * self._costs[0])
        covariance: Vector = np.outer(self._costs, self._costs) * common**2 + np.diag((own * least) ** 2)
        return covariance

    def _drift(self, elapsed_s: float) -> None:
        most = np.maximum(self._covariance.diagonal(), self._spread(UNSURE_COMMON, UNSURE_OWN).diagonal())
        self._covariance += elapsed_s * self._spread(self._drift_common, self._drift_own)
        shrink = np.sqrt(np.minimum(1.0, most / self._covariance.diagonal()))
        self._covariance *= np.outer(shrink, shrink)

    def _learn(self, forward: ForwardStats, num_alike: int) -> None:
        features = _features(forward, self._knots)
        expected = float(features @ self._costs)
        noise = (MEASUREMENT_NOISE * expected) ** 2 / min(num_alike, 10)
        spread = self._covariance @ features
        variance = float(features @ spread) + noise
        limit = OUTLIER * variance**0.5
        error = min(max(forward.ms - expected, -limit), limit)
        self._num_odd = max(0.0, self._num_odd + (1.0 if abs(error) == limit else -0.5))
        if self._num_odd > MOST_ODD:
            self._num_odd = 0.0
            self._covariance = self._spread(UNSURE_COMMON, 1.0)
            return
        error = min(error, MOST_CHANGE * expected)
        self._costs = np.maximum(self._costs + spread * (error / variance), (1.0 - MOST_CHANGE) * self._costs)
        self._costs[0] = max(self._costs[0], LEAST_MS)
        self._covariance -= np.outer(spread, spread) / variance


class CostEstimator:
    """Estimates the cost of all forwards, and that of each mode that has run in force.

    A mode's own estimate is left as it is while another mode runs, since what the machine does beside its
    forwards is not seen then, nor in the few forwards of an exploration: these count only for an estimate
    that is older than REMEMBERED_S.
    start, now_s: as for StepCostEstimator.
    """

    def __init__(self, start: StepCost, now_s: float):
        self._all = StepCostEstimator(start, now_s)
        self._own: dict[Mode, StepCostEstimator] = {}
        self._seen_s: dict[Mode, float] = {}

    @property
    def cost(self) -> StepCost:
        return self._all.cost

    @property
    def own(self) -> dict[Mode, StepCost]:
        return {mode: estimator.cost for mode, estimator in self._own.items()}

    def update(self, forwards: Sequence[ForwardStats], now_s: float) -> None:
        """Learns from the forwards since the last call, in any order."""
        self._all.update(forwards, now_s)
        by_mode: defaultdict[Mode, list[ForwardStats]] = defaultdict(list)
        for forward in forwards:
            if forward.mode is not None and self._counts(forward.mode, forward.is_exploration, now_s):
                by_mode[forward.mode].append(forward)
        for mode, own in by_mode.items():
            if mode not in self._own:
                self._own[mode] = StepCostEstimator(self.cost, now_s, OWN_DRIFT)
            self._own[mode].update(own, now_s)
            if not all(forward.is_exploration for forward in own):
                self._seen_s[mode] = now_s

    def _counts(self, mode: Mode, is_exploration: bool, now_s: float) -> bool:
        return not is_exploration or (mode in self._own and now_s - self._seen_s[mode] > REMEMBERED_S)


class YieldEstimator:
    """Estimates the tokens and forwards of a round, by plan.

    Rounds are counted by plan, and only of plans that a policy may choose: clients may name any number of
    others.
    """

    def __init__(self, now_s: float):
        self._now_s = now_s
        self._counts: dict[DecodePlan, Vector] = {}  # rounds, tokens, forwards, rows

    def update(self, rounds: Iterable[RoundStats], now_s: float) -> None:
        """Learns from the rounds since the last call."""
        self._forget(0.5 ** (max(0.0, now_s - self._now_s) / HALF_LIFE_S))
        self._now_s = now_s
        for made in rounds:
            if not all(0 < count <= MOST_COUNTED for count in (made.tokens, made.forwards, made.rows)):
                continue
            if made.plan.mode is not Mode.AR and not made.is_clients:
                sums = self._counts.setdefault(made.plan, np.zeros(4))
                sums += (1.0, made.tokens, made.forwards, made.rows)
        if len(self._counts) > MAX_PLANS:
            most = sorted(self._counts, key=lambda plan: -self._counts[plan][0])[:MAX_PLANS]
            self._counts = {plan: self._counts[plan] for plan in most}

    def yields(self) -> tuple[RoundYield, ...]:
        """Returns the yields of plans that ran."""
        more = {mode: self._against_priors(mode) for mode in {plan.mode for plan in self._counts}}
        return tuple(self._counted(plan, *more[plan.mode]) for plan in self._counts)

    def _forget(self, share: float) -> None:
        for plan, sums in list(self._counts.items()):
            sums *= share * min(1.0, MAX_ROUNDS / max(1.0, sums[0]))
            if sums[0] < 0.01:
                del self._counts[plan]

    def _counted(self, plan: DecodePlan, more_tokens: float, more_forwards: float) -> RoundYield:
        """Returns a plan's yield, its prior times these ratios counting as PRIOR_ROUNDS more."""
        prior = prior_yield(plan)
        num_rounds, tokens, forwards, rows = map(float, self._counts[plan])
        rows_per_forward = rows / forwards
        tokens += PRIOR_ROUNDS * prior.tokens * more_tokens
        forwards += PRIOR_ROUNDS * prior.forwards * more_forwards
        total = num_rounds + PRIOR_ROUNDS
        return RoundYield(
            plan,
            max(1e-4, round(tokens / total, 4)),
            max(1e-4, round(forwards / total, 4)),
            round(num_rounds, 2),
            max(0.01, round(rows_per_forward, 2)),
        )

    def _against_priors(self, mode: Mode) -> tuple[float, float]:
        """Returns all of a mode's tokens and forwards as ratios to its priors, with one round of ratio 1."""
        made, expected = np.ones(2), np.ones(2)
        for plan, (num_rounds, tokens, forwards, _) in self._counts.items():
            if plan.mode is not mode:
                continue
            prior = prior_yield(plan)
            made += tokens / prior.tokens, forwards / prior.forwards
            expected += num_rounds
        more_tokens, more_forwards = made / expected
        return float(more_tokens), float(more_forwards)


def _is_sound(forward: ForwardStats) -> bool:
    """Returns False for a forward that can't have happened as measured."""
    counts = forward.num_tokens, forward.num_segments, forward.num_cached + 1
    return SOUND_MS[0] <= forward.ms <= SOUND_MS[1] and all(0 < count <= MOST_COUNTED for count in counts)


def _features(forward: ForwardStats, knots: tuple[int, ...]) -> Vector:
    """Returns the factor of each parameter: base, the rise from knot to knot, segments, cached tokens."""
    left, right = np.array(knots[:-1], float), np.array(knots[1:], float)
    steps = np.maximum((forward.num_tokens - left) / (right - left), 0.0)
    steps[:-1] = np.minimum(steps[:-1], 1.0)
    return np.concatenate(([1.0], steps, [forward.num_segments - 1.0, forward.num_cached / 1000.0]))


def _parameters(cost: StepCost) -> Vector:
    rises = np.diff(np.array(cost.knot_ms))
    return np.concatenate(([cost.knot_ms[0]], rises, [cost.segment_ms, cost.cached_ms]))


def _step_cost(costs: Vector, knots: tuple[int, ...]) -> StepCost:
    """Makes a StepCost of the parameters, rounded since it is published five times a second."""
    knot_ms = np.round(np.cumsum(costs[:-2]), 4)
    return StepCost(knots, tuple(map(float, knot_ms)), round(float(costs[-2]), 5), round(float(costs[-1]), 5))


def _bends(knots: tuple[int, ...]) -> Vector:
    """Returns rows for the change of slope at each inner knot, in ms over the narrower of its sides."""
    widths = np.diff(np.array(knots, float))
    rows = np.zeros((max(0, len(widths) - 1), len(widths) + 3))
    for index in range(len(rows)):
        rows[index, 1 + index] = -1.0
        rows[index, 2 + index] = widths[index] / widths[index + 1]
    return rows


def _least_squares(matrix: Vector, vector: Vector, start: Vector) -> Vector:
    """Minimises x'Ax/2 - b'x over x >= 0, a coordinate at a time; the first is kept above zero."""
    found = start.copy()
    for _ in range(200):
        before = found.copy()
        for index in range(len(found)):
            if matrix[index, index] > 0:
                rest = vector[index] - matrix[index] @ found + matrix[index, index] * found[index]
                found[index] = max(LEAST_MS if index == 0 else 0.0, rest / matrix[index, index])
        if np.abs(found - before).max() < 1e-6 * max(1e-9, float(np.abs(found).max())):
            break
    return found
