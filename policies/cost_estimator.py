"""The estimator of what forwards cost now: the machine's shape, times factors that every forward tells of.

A forward of a mode takes shape(rows, segments, cached) x pace x factor(mode, rows). The shape comes from the
sweep at the start and stays. The pace is the machine's of this moment: whatever slows all forwards is booked
on it, and it cancels out of every comparison of plans. A mode's factors, which do not cancel, are thereby
learned from forwards of two plans close in time, and go back to the shape as they age.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from policies.cost import UNKNOWN_SPREAD, ForwardStats, ModeFactors, StepCost, octave_weights
from policies.cost_fit import is_sound, rounded_cost
from policies.factors import DriftingFactors, Prior
from policies.modes import Mode

Term: TypeAlias = tuple[Mode | None, int | None]
"""(None, None) for the pace, a mode's own with None, a mode's at an octave of rows."""

PACE = Prior(spread=1.0, lasting_s=20.0)
"""The machine's pace: by a quarter in a second, and a few times the sweep's in all."""
OF_MODE = Prior(spread=UNKNOWN_SPREAD, lasting_s=600.0)
"""A mode's factor at any number of rows: what else is done beside its forwards, as sending tokens."""
OF_OCTAVE = Prior(spread=0.15, lasting_s=600.0)
"""A mode's further factor at 2^n rows: the shape's own error."""
NOISE = 0.15
"""The standard deviation of one forward's log latency; that of the median of n falls with their root."""
MOST_ALIKE = 10
"""The number of forwards of a moment past which more of the same say nothing more."""
REFERENCE_SHARE = 0.2
"""The share that one reading has in what counts as running, against which spreads are told."""

_PACE: Term = (None, None)


class CostEstimator:
    """Estimates the pace and the modes' factors over a fixed shape.

    shape: by policies.cost_fit, or a prior. now_s: any clock that moves forward, the same one for all calls.
    known: factors learned before, as `factors` had them.
    """

    def __init__(self, shape: StepCost, now_s: float, known: Mapping[Mode, ModeFactors] | None = None):
        self._shape = shape
        self._num_octaves = len(shape.knots)
        self._factors: DriftingFactors[Term] = DriftingFactors(_PACE, PACE, now_s)
        self._reference: dict[Term, float] = {}
        for mode, factors in (known or {}).items():
            self._remember(mode, factors)

    @property
    def cost(self) -> StepCost:
        """The shape at the present pace."""
        (pace,), _ = self._factors.estimates([{_PACE: 1.0}], {})
        return rounded_cost(self._shape.scaled(math.exp(pace)))

    @property
    def factors(self) -> dict[Mode, ModeFactors]:
        """The factors of each mode that has run, with their spreads against what runs now."""
        modes = [mode for mode in Mode if (mode, None) in self._factors]
        if not modes:
            return {}
        octaves = range(self._num_octaves)
        sums = [_terms(mode, {octave: 1.0}) for mode in modes for octave in octaves]
        logs, spreads = self._factors.estimates(sums, self._reference)
        found = {}
        for number, mode in enumerate(modes):
            own = slice(number * self._num_octaves, (number + 1) * self._num_octaves)
            found[mode] = ModeFactors(_rounded(logs[own]), _rounded(spreads[own]))
        return found

    def update(self, forwards: Iterable[ForwardStats], now_s: float) -> None:
        """Learns from the forwards since the last call, in any order; like ones count by their median."""
        self._factors.advance(now_s)
        alike: defaultdict[tuple[Mode, int, int], list[ForwardStats]] = defaultdict(list)
        for forward in filter(is_sound, forwards):
            if forward.mode is not None:
                sizes = forward.num_tokens.bit_length(), forward.num_segments.bit_length()
                alike[forward.mode, *sizes].append(forward)
        for group in alike.values():
            self._learn(group)

    def _learn(self, group: Sequence[ForwardStats]) -> None:
        ratios = sorted((math.log(forward.ms / self._shape.ms(*forward[:3])), forward) for forward in group)
        ratio, median = ratios[len(ratios) // 2]
        assert median.mode is not None
        weights = _terms(median.mode, octave_weights(median.num_tokens, self._num_octaves))
        self._add(median.mode)
        noise = NOISE / math.sqrt(min(len(group), MOST_ALIKE))
        self._factors.observe(weights, ratio, noise)
        for term in {*self._reference, *weights}:
            before = self._reference.get(term, 0.0)
            self._reference[term] = before + REFERENCE_SHARE * (weights.get(term, 0.0) - before)

    def _add(self, mode: Mode) -> None:
        self._factors.add((mode, None), OF_MODE)
        for octave in range(self._num_octaves):
            self._factors.add((mode, octave), OF_OCTAVE)

    def _remember(self, mode: Mode, factors: ModeFactors) -> None:
        mean = sum(factors.logs) / len(factors.logs)
        self._factors.add((mode, None), OF_MODE, mean, min(factors.spreads))
        for octave, (log, spread) in enumerate(zip(factors.logs, factors.spreads, strict=True)):
            if octave < self._num_octaves:
                self._factors.add((mode, octave), OF_OCTAVE, log - mean, spread)
        self._add(mode)


def _terms(mode: Mode, octaves: Mapping[int, float]) -> dict[Term, float]:
    return {(mode, None): 1.0, **{(mode, octave): weight for octave, weight in octaves.items()}}


def _rounded(values: Iterable[float]) -> tuple[float, ...]:
    """Returns the values as they are published five times a second."""
    return tuple(round(float(value), 4) for value in values)
