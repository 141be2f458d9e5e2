"""The fit of a forward's cost to a sweep: the machine's shape, which later measurements only scale."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from policies.cost import ForwardStats, StepCost

Vector = NDArray[np.float64]

SMOOTHNESS = 0.3
"""The weight of a bend in the fitted line, against a measurement's relative error."""
MIN_MS = 1e-3
"""The shortest time that a forward is believed to take, so that rounding leaves something of each cost."""
SOUND_MS = (1e-6, 1e7)
"""The shortest and the longest latency, in ms, of a forward that counts: others are measuring errors."""
MAX_COUNTED = 10**9
"""The largest number of tokens in a forward, or of anything in a round, that counts."""


def knots_up_to(max_tokens: int) -> tuple[int, ...]:
    """Returns the powers of two up to the first that is at least max_tokens."""
    return tuple(2**power for power in range((max_tokens - 1).bit_length() + 1))


def fit_step_cost(forwards: Sequence[ForwardStats], knots: tuple[int, ...]) -> StepCost:
    """Fits a StepCost by least relative squares, robust (Huber's weights) and with no negative cost.

    Between knots that were not measured the line is as straight as the others let it be.
    Raises ValueError without any forward.
    """
    forwards = [forward for forward in forwards if is_sound(forward)]
    if not forwards:
        raise ValueError("no forwards to fit a cost to")
    costs = np.array([forward.ms for forward in forwards])
    rows = np.stack([_features(forward, knots) for forward in forwards]) / costs[:, None]
    bends = SMOOTHNESS * _bends(knots) / float(np.median(costs))
    weights = np.ones(len(costs))
    fitted = np.zeros(rows.shape[1])
    for _ in range(6):
        weighted = rows * weights[:, None]
        fitted = nonnegative_least_squares(weighted.T @ rows + bends.T @ bends, weighted.sum(axis=0), fitted)
        errors = np.abs(1.0 - rows @ fitted)
        scale = max(1.4826 * float(np.median(errors)), 0.01)
        weights = np.minimum(1.0, 1.5 * scale / np.maximum(errors, 1e-9))
    return _step_cost(fitted, knots)


def rounded_cost(cost: StepCost) -> StepCost:
    """Returns the cost as it is published, five times a second."""
    knot_ms = tuple(max(MIN_MS, round(ms, 4)) for ms in cost.knot_ms)
    return StepCost(cost.knots, knot_ms, round(cost.segment_ms, 5), round(cost.cached_ms, 5))


def is_sound(forward: ForwardStats) -> bool:
    """Returns False for a forward that can't have happened as measured."""
    return (
        SOUND_MS[0] <= forward.ms <= SOUND_MS[1]
        and 0 < forward.num_tokens <= MAX_COUNTED
        and 0 < forward.num_segments <= MAX_COUNTED
        and 0 <= forward.num_cached < MAX_COUNTED
    )


def nonnegative_least_squares(matrix: Vector, vector: Vector, start: Vector) -> Vector:
    """Minimises x'Ax/2 - b'x over x >= 0, a coordinate at a time; the first is kept above zero."""
    found = start.copy()
    for _ in range(200):
        before = found.copy()
        for index in range(len(found)):
            if matrix[index, index] > 0:
                rest = vector[index] - matrix[index] @ found + matrix[index, index] * found[index]
                found[index] = max(MIN_MS if index == 0 else 0.0, rest / matrix[index, index])
        if np.abs(found - before).max() < 1e-6 * max(1e-9, float(np.abs(found).max())):
            break
    return found


def _features(forward: ForwardStats, knots: tuple[int, ...]) -> Vector:
    """Returns the factor of each parameter: base, the rise from knot to knot, segments, cached tokens."""
    left, right = np.array(knots[:-1], float), np.array(knots[1:], float)
    steps = np.maximum((forward.num_tokens - left) / (right - left), 0.0)
    steps[:-1] = np.minimum(steps[:-1], 1.0)
    return np.concatenate(([1.0], steps, [forward.num_segments - 1.0, forward.num_cached / 1000.0]))


def _step_cost(costs: Vector, knots: tuple[int, ...]) -> StepCost:
    knot_ms = tuple(float(ms) for ms in np.cumsum(costs[:-2]))
    return rounded_cost(StepCost(knots, knot_ms, float(costs[-2]), float(costs[-1])))


def _bends(knots: tuple[int, ...]) -> Vector:
    """Returns rows for the change of slope at each inner knot, in ms over the narrower of its sides."""
    widths = np.diff(np.array(knots, float))
    rows = np.zeros((max(0, len(widths) - 1), len(widths) + 3))
    for index in range(len(rows)):
        rows[index, 1 + index] = -1.0
        rows[index, 2 + index] = widths[index] / widths[index + 1]
    return rows
