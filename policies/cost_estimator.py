"""The estimator of what forwards cost now: the machine's shape, times factors that every forward tells of.

A forward of a mode takes shape(rows, segments, cached) x pace x factor(mode, rows). The shape comes from the
sweep at the start and stays. The pace is the machine's of this moment: whatever slows all forwards is booked
on it, and it cancels out of every comparison of plans. A mode's factors, which do not cancel, are thereby
learned from forwards of two plans close in time, and go back to the shape as they age.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping

from policies.cost import UNKNOWN_SPREAD, ForwardStats, ModeFactors, StepCost
from policies.cost_fit import is_sound, rounded_cost
from policies.factors import Prior
from policies.mode_factors import ModeFactorsEstimator
from policies.modes import Mode

PACE = Prior(spread=1.0, lasting_s=20.0)
"""The machine's pace: by a third in a second, and a few times the sweep's in all."""
OF_MODE = Prior(spread=UNKNOWN_SPREAD, lasting_s=600.0)
"""A mode's factor at any number of rows: what else is done beside its forwards, as sending tokens."""
OF_OCTAVE = Prior(spread=0.1, lasting_s=600.0)
"""A mode's further factor at 2^n rows."""
OF_ROWS = Prior(spread=0.4, lasting_s=14400.0)
"""All modes' factor at few, some and many rows: the shape's own error. What a small forward takes depends on
what runs before and beside it, so beside large ones the sweep has it up to twice too high or too low."""
NOISE = 0.15
"""The standard deviation of one forward's log latency; that of the median of n falls with their root."""
MAX_ALIKE = 10
"""The number of forwards of a moment past which more of the same say nothing more."""


class CostEstimator:
    """Estimates the pace and the modes' factors over a fixed shape.

    shape: by policies.cost_fit, or a prior. now_s: any clock that moves forward, the same one for all calls.
    known: factors learned before, as `factors` had them.
    """

    def __init__(self, shape: StepCost, now_s: float, known: Mapping[Mode, ModeFactors] | None = None):
        self._shape = shape
        num_octaves = len(shape.knots)
        self._learned = ModeFactorsEstimator(PACE, OF_MODE, OF_OCTAVE, OF_ROWS, num_octaves, now_s, known)

    @property
    def cost(self) -> StepCost:
        """The shape at the present pace."""
        return rounded_cost(self._shape.scaled(math.exp(self._learned.common)))

    @property
    def factors(self) -> dict[Mode, ModeFactors]:
        """The factors of each mode that has run, by octaves of query tokens."""
        return self._learned.factors

    def update(self, forwards: Iterable[ForwardStats], now_s: float) -> None:
        """Learns from the forwards since the last call, in any order; those of a mode count together.

        One by one they would teach that few rows are dear: a forward is small where a request has just ended
        or begun, which others work on meanwhile.
        """
        self._learned.advance(now_s)
        by_mode: defaultdict[Mode, list[ForwardStats]] = defaultdict(list)
        for forward in filter(is_sound, forwards):
            if forward.mode is not None:
                by_mode[forward.mode].append(forward)
        spent_ms = {mode: sum(forward.ms for forward in group) for mode, group in by_mode.items()}
        # The most first: it tells of the pace, by which the others are then judged.
        modes = sorted(spent_ms, key=lambda mode: -spent_ms[mode])
        for mode in modes:
            group = by_mode[mode]
            expected_ms = sum(self._shape.ms(*forward[:3]) for forward in group)
            log_rows = sum(math.log(forward.num_tokens) * forward.ms for forward in group) / spent_ms[mode]
            noise = NOISE / math.sqrt(min(len(group), MAX_ALIKE))
            log = math.log(spent_ms[mode] / expected_ms)
            self._learned.observe(mode, math.exp(log_rows), log, noise, is_stray=mode != modes[0])
